"""Compiles what the cells will run, in many processes at once, into the caches that the timing process then reads.

Inductor's cache is keyed by the graph (FlexAttention's mask function with it), the shapes, strides and dtypes of its
inputs, and the configuration; Triton's by the kernel's source and how its arguments specialise. So the workers run
every cell at its own shapes, but under a mask that hides everything, which costs next to nothing; and q, k, v and dout
share their storage, so that many workers fit on the card together.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.cells import Cell, scenario
from benchmarks.peers import OURS, Inputs, Settings, competitors, dtype_on


def use_caches(folder: Path) -> None:
    """Point every compiler at caches below the folder. Call before anything is compiled; child processes inherit it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(folder / "flash_attn")


def configure_compiler() -> None:
    """What the timing process and the workers must agree on: it is part of the cache's key."""
    import torch._functorch.config

    # A backward that may run twice (retain_graph) cannot overwrite what the forward saved.
    torch._functorch.config.donated_buffer = False


def warm(cells: Sequence[Cell], names: Sequence[str], settings: Settings, workers: int, device: str) -> None:
    """Compile for the cells in up to `workers` processes, fewer if the card has no room for them."""
    first_of = {cell.compilation: cell for cell in reversed(cells)}
    jobs = list(reversed(first_of.values()))
    if not jobs:
        return
    if device != "cpu":
        # out and three gradients beside the shared input, one more for what the kernels add, and a CUDA context.
        largest = max(2 * cell.batch * cell.n * cell.heads * cell.d for cell in jobs)
        room = torch.cuda.mem_get_info()[0]
        workers = max(1, min(workers, int(0.9 * room // (6 * largest + 2**30))))
    begin = time.monotonic()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the workers are the parallelism
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, initializer=_start) as pool:
        futures = {}
        for cell in jobs:
            # FlashAttention-4 compiles for any length, and at length.
            shortest = min(other.n for other in jobs if other.section == cell.section)
            wanted = [name for name in names if name != "fa4" or cell.n == shortest]
            futures[pool.submit(_compile, cell, wanted, settings, device)] = cell
        try:
            for future in as_completed(futures):
                for trouble in future.result():
                    print(f"warm-up of {futures[future].key}: {trouble}", flush=True)
        except BrokenProcessPool as error:
            # Nothing is lost but time: the timing process compiles what it does not find, and reports what fails.
            print(f"warm-up ended early: {error}", flush=True)
    print(f"warmed {len(jobs)} compilations with {workers} processes in {time.monotonic() - begin:.0f} s", flush=True)


def _start() -> None:
    configure_compiler()
    torch.set_num_threads(1)


def _compile(cell: Cell, names: Sequence[str], settings: Settings, device: str) -> list[str]:
    """Runs forward and backward of each competitor once; returns what went wrong."""
    torch._dynamo.reset()
    mask = scenario(cell.case, cell.n, cell.seed)
    troubles = []
    for peer in competitors(names, settings):
        try:
            if peer.warm is None or peer.refusal(cell, mask, device) is not None:
                continue
            run = peer.warm(_shared_inputs(cell, device, heads_first=peer.name not in (*OURS, "fa4")), mask)
            out = run.forward()
            if run.leaves:
                torch.autograd.grad(out, run.leaves, run.dout)
            del run, out
        except Exception as error:  # the timing process meets it again and records it
            troubles.append(f"{peer.name}: {type(error).__name__}: {str(error)[:200]}")
        if device != "cpu":
            torch.cuda.empty_cache()
    return troubles


def _shared_inputs(cell: Cell, device: str, *, heads_first: bool) -> Inputs:
    """Zeros, q and dout in one storage, k and v in one. `heads_first`: as `[B, H, N, D]` they are contiguous."""

    def zeros(heads: int) -> torch.Tensor:
        shape = (cell.batch, heads, cell.n, cell.d) if heads_first else (cell.batch, cell.n, heads, cell.d)
        x = torch.zeros(shape, dtype=dtype_on(device), device=device)
        return x.transpose(1, 2) if heads_first else x

    q = zeros(cell.heads)
    k = q if cell.kv_heads == cell.heads else zeros(cell.kv_heads)
    return Inputs(q, k, k, q)
