"""Compiles what the cells will run, in many processes at once: one after the other it would take longer than to time.

Our kernels, and FlashAttention-4's, go through their compilers' caches on disk: one process compiles what many cells
share, and each finds it there; FlashAttention-4 takes seconds to import, which each does meanwhile. A graph of
FlexAttention, and a plan of cuDNN, is kept by the process that made it, which then measures its cells. All are compiled
by running them at the cells' own shapes, but under a mask that hides everything, which costs next to nothing; and q, k,
v and dout share their memory, so that many processes fit on a card.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cells import Cell, scenario
from benchmarks.peers import OURS, Inputs, Peer, Settings, competitors, dtype_on

CACHED = (*OURS, "fa4")
"""Compiled into a cache on disk, for any process and length."""
KEPT = ("flex", "cudnn")
"""Compiled for a cell's shape, and at hand in the process that did it."""
RACED = ("cases", "sparsity", "packs")
OUT_OF_MEMORY_ATTEMPTS = 8


def use_caches(folder: Path) -> None:
    """Point every compiler at caches below the folder. Call before anything is compiled; child processes inherit it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(folder / "flash_attn")


def configure_compiler() -> None:
    """What holds in every process that compiles or measures."""
    import torch._dynamo.config
    import torch._functorch.config

    # A backward that may run twice (retain_graph) cannot overwrite what the forward saved.
    torch._functorch.config.donated_buffer = False
    # A process compiles FlexAttention for many shapes and masks; at the limit it would refuse one more.
    torch._dynamo.config.recompile_limit = 256


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process compiles at a time."""

    cells: tuple[Cell, ...]
    names: tuple[str, ...]
    """Of competitors."""
    backward: bool = True
    keeps: bool = False
    """What it compiles is at hand only in the process that does, which is to measure these cells."""
    loads: tuple[str, ...] = ()
    """Of competitors that the process is to load: it will measure them too."""


def jobs(pending: Sequence[tuple[Cell, Sequence[str]]]) -> list[Job]:
    """The compilations of these cells and competitors, the longest first.

    Args:
        pending: cells, each with the competitors that are to be measured on it.
    """
    shared: dict[tuple[object, ...], dict[tuple[int, int], Cell]] = {}
    kept: dict[tuple[object, ...], Job] = {}
    for cell, names in pending:
        mask = scenario(cell.case, cell.n, cell.seed).case.mask
        backward = cell.section != "schedule"
        for name in names:
            if name in CACHED and (name in OURS or cell.section in RACED):
                kind = (mask.num_intervals, mask.causal) if name in OURS else (cell.case.split("@")[0],)
                key = (name, *kind, cell.d, cell.heads, cell.kv_heads, backward)
                # Lengths and batches may differ in how the compiler specialises them.
                shared.setdefault(key, {}).setdefault((cell.n, cell.batch), cell)
        graphs = tuple(name for name in names if name in KEPT and cell.section in RACED)
        if graphs:
            loads = ("fa4",) if "fa4" in names else ()
            kept.setdefault(cell.compilation, Job(cells=(cell,), names=graphs, keeps=True, loads=loads))
    found = []
    for key, by_shape in shared.items():
        cells = [by_shape[shape] for shape in sorted(by_shape)]
        # FlashAttention-4 compiles for any length, and at length.
        found.append(
            Job(cells=tuple(cells[:1] if key[0] == "fa4" else cells), names=(str(key[0]),), backward=bool(key[-1]))
        )
    return found + sorted(kept.values(), key=lambda job: -job.cells[0].n)


def compile_job(job: Job, settings: Settings, device: str) -> list[str]:
    """Runs forward and backward of each competitor once on each cell; returns what went wrong."""
    troubles = []
    for cell in job.cells:
        for peer in competitors(job.loads, settings):
            if trouble := _load(cell, peer, device):
                troubles.append(f"{cell.key}, {peer.name}: {trouble}")
        for peer in competitors(job.names, settings):
            for attempt in range(OUT_OF_MEMORY_ATTEMPTS):
                trouble = _compile(cell, peer, job.backward, device)
                if device != "cpu":
                    torch.cuda.empty_cache()
                if trouble is None or not trouble.startswith("OutOfMemoryError"):
                    break
                time.sleep(1 + attempt)  # the other processes need the memory for a moment only
            if trouble is not None:
                # The timing meets it again and records it.
                troubles.append(f"{cell.key}, {peer.name}: {trouble}")
    return troubles


def _load(cell: Cell, peer: Peer, device: str) -> str | None:
    try:
        if peer.load is not None and peer.refusal(cell, scenario(cell.case, cell.n, cell.seed), device) is None:
            peer.load()
    except Exception as error:
        return _describe(error)
    return None


def _compile(cell: Cell, peer: Peer, backward: bool, device: str) -> str | None:
    mask = scenario(cell.case, cell.n, cell.seed)
    try:
        if peer.warm is None or peer.refusal(cell, mask, device) is not None:
            return None
        run = peer.warm(shared_inputs(cell, device, heads_first=peer.name not in CACHED), mask)
        out = run.forward()
        if run.leaves and backward:
            torch.autograd.grad(out, run.leaves, run.dout)
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        return _describe(error)
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def shared_inputs(cell: Cell, device: str, *, heads_first: bool) -> Inputs:
    """Zeros, q and dout in one memory, k and v too. `heads_first`: as `[B, H, N, D]` they are contiguous.

    Each has a storage of its own over that memory: to `torch.compile` they do not alias, as the real ones do not.
    """

    def zeros(heads: int) -> torch.Tensor:
        shape = (cell.batch, heads, cell.n, cell.d) if heads_first else (cell.batch, cell.n, heads, cell.d)
        return torch.zeros(shape, dtype=dtype_on(device), device=device)

    def view(x: torch.Tensor) -> torch.Tensor:
        own = torch.from_dlpack(x)
        return own.transpose(1, 2) if heads_first else own

    q = zeros(cell.heads)
    k = q if cell.kv_heads == cell.heads else zeros(cell.kv_heads)
    return Inputs(view(q), view(k), view(k), view(q))
