"""What a mask costs beside the attention itself: its memory against N, and its tile schedule in time and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cells import Cell, scenario
from benchmarks.mask_mods import block_mask_bytes
from benchmarks.peers import OURS, Inputs, Peer, dtype_on, make_inputs
from benchmarks.race import FAILED, OK, REFUSED
from benchmarks.timing import Timer
from fm_longctx import flashmask_attention
from fm_longctx.attention.passes import load_backend
from fm_longctx.kernels.schedule import all_tile_runs
from fm_longctx.mask import FlashMask

Key = tuple[int, int, bool]


def schedule_bytes(mask: FlashMask, keys: Sequence[Key]) -> int:
    """Build the tile schedules that the mask does not hold yet; their bytes."""
    built = all_tile_runs(mask, keys)
    # The runs and the intervals are one table each for all of them.
    tensors = {x.data_ptr(): x for schedule in built for x in schedule}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def mask_bytes(mask: FlashMask) -> int:
    return sum(x.numel() * x.element_size() for x in (mask.starts, mask.ends))


def memory(cell: Cell, peers: Sequence[Peer], device: str) -> Iterator[dict[str, Any]]:
    """One row a competitor: bytes of its mask, and of one forward and backward beyond inputs, output and gradients.

    `measured` says whether the peak was: from N x N masks beyond the limit only the mask's own size is computed, and of
    FlexAttention only its block mask is looked at, by the shapes of its tables.
    """
    mask = scenario(cell.case, cell.n, cell.seed)
    for peer in peers:
        row: dict[str, Any] = {"competitor": peer.name, "status": OK, "measured": False}
        if peer.name == "dense":
            row["mask_bytes"] = cell.n * cell.n
        elif peer.name == "flex":
            row["mask_bytes"] = block_mask_bytes(cell.n)
        elif peer.name in OURS:
            row["mask_bytes"] = mask_bytes(mask.case.mask)
        else:
            continue
        try:
            reason = peer.refusal(cell, mask, device)
            if peer.name in OURS and reason is not None:
                row |= {"status": REFUSED, "note": reason}
            elif peer.name != "flex" and reason is None:
                inputs = make_inputs(cell, device)
                if peer.name in OURS:
                    on_device = mask.case.mask.to(device)
                    keys = _keys(peer.name, inputs, on_device, backward=True)
                    row["schedule_bytes"] = schedule_bytes(on_device, keys)
                if device != "cpu":
                    row |= {"workspace_bytes": _workspace(peer, inputs, cell), "measured": True}
        except Exception as error:  # whatever a competitor raises is its result
            row |= {"status": FAILED, "note": f"{type(error).__name__}: {str(error)[:300]}"}
        yield row
        if device != "cpu":
            torch.cuda.empty_cache()


def schedule(cell: Cell, backends: Sequence[str], device: str, timer: Timer) -> Iterator[dict[str, Any]]:
    """One row a backend: ms and bytes of its tile schedules, of the forward alone and of a training step, beside one
    forward; and the ms that the host alone is busy with building them."""
    mask = scenario(cell.case, cell.n, cell.seed).case.mask.to(device)
    for backend in backends:
        row: dict[str, Any] = {"competitor": backend, "status": OK, "area": int(mask.area().sum())}
        try:
            shape = (cell.batch, cell.n, cell.heads, cell.d)
            q, k, v = (torch.randn(shape, dtype=dtype_on(device), device=device) for _ in range(3))
            reason = load_backend(backend).refusal(q, v, mask.num_intervals, None)
            if reason is not None:
                yield row | {"status": REFUSED, "note": reason}
                continue
            inputs = Inputs(q, k, v, q)
            for name, keys in (
                ("forward", _keys(backend, inputs, mask)),
                ("both", _keys(backend, inputs, mask, backward=True)),
            ):
                build = partial(_rebuild, mask, keys)
                row[f"{name}_schedule_ms"] = timer(build).ms
                row[f"{name}_schedule_host_ms"] = _host_ms(build, device)
                row[f"{name}_schedule_bytes"] = schedule_bytes(mask, keys)
            with torch.no_grad():
                timing = timer(partial(flashmask_attention, q, k, v, mask, backend=backend))
            row |= {"forward_ms": timing.ms, "forward_low": timing.low, "forward_high": timing.high}
        except Exception as error:  # whatever a competitor raises is its result
            row |= {"status": FAILED, "note": f"{type(error).__name__}: {str(error)[:300]}"}
        yield row


def _keys(backend: str, inputs: Inputs, mask: FlashMask, *, backward: bool = False) -> list[Key]:
    """(block_m, block_n, by_row) of the schedules that the forward, or forward and backward, read."""
    module = load_backend(backend)
    q, v = inputs.q, inputs.v
    keys = list(module.schedules_needed(q, v, mask, backward=False, deterministic=False))
    if backward:
        needed = module.schedules_needed(q, v, mask, backward=True, deterministic=False)
        keys += [key for key in needed if key not in keys]
    return keys


def _rebuild(mask: FlashMask, keys: Sequence[Key]) -> None:
    mask.cache.clear()
    all_tile_runs(mask, keys)


def _host_ms(function: Callable[[], object], device: str) -> float:
    """Median time until the function returns, on a GPU with nothing to wait for."""
    samples = []
    for _ in range(20 if device != "cpu" else 3):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples)


def _workspace(peer: Peer, inputs: Inputs, cell: Cell) -> int:
    """Peak bytes of a forward and backward beyond inputs, output, gradients: workspace, mask and schedule included."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = peer.prepare(inputs, scenario(cell.case, cell.n, cell.seed))
    copies = sum(x.numel() * x.element_size() for x in run.leaves if x.data_ptr() not in {y.data_ptr() for y in inputs})
    copies += run.dout.numel() * run.dout.element_size() if run.dout.data_ptr() != inputs.dout.data_ptr() else 0
    out = run.forward()
    gradients = torch.autograd.grad(out, run.leaves, run.dout)
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in (out, *gradients))
    return torch.cuda.max_memory_allocated() - before - copies - kept
