"""Which block shapes are fastest? Times candidates of the portable kernels; the winners stand in kernels/blocks.py.

    python -m benchmarks.blocks --head-dims 64 128 --warm 15
    python -m benchmarks.blocks --head-dims 64 --kernels forward --masks qk_sparse document --lengths 8192 131072

Masks of benchmarks/cases.py, bf16, 16 heads, one sample, or as many as make 32K tokens. Forward, dQ and
dK/dV kernels are timed apart: the shipped block's time, and how many times faster each candidate is. One whose result
is not that of the shipped block is reported instead. With `--warm`, that many processes first compile all candidates,
so that the timing one finds them in Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from benchmarks.cases import cases
from benchmarks.environment import environment
from fm_longctx.kernels import portable
from fm_longctx.kernels.blocks import Block, Blocks, choose
from fm_longctx.mask import FlashMask

# By kernel and D, beside the shipped blocks. `late` is of use where columns have intervals.
CANDIDATES: dict[tuple[str, int], list[Block]] = {
    ("forward", 64): [
        Block(128, 64, 4, 3),
        Block(128, 64, 4, 3, late=True),
        Block(128, 64, 4, 4, late=True),
        Block(128, 64, 4, 3, True, late=True),
        Block(64, 64, 4, 3, True, late=True),
        Block(64, 64, 4, 4, True, late=True),
        Block(64, 128, 4, 2, True, late=True, registers=168),
        Block(128, 64, 8, 3, True, late=True, registers=128),
    ],
    ("forward", 128): [
        Block(64, 64, 4, 3, True),
        Block(64, 64, 4, 3, True, late=True),
        Block(128, 64, 8, 4, True),
        Block(128, 128, 8, 2, True, late=True),
        Block(128, 128, 8, 3, True, late=True),
    ],
    ("query", 64): [
        Block(64, 64, 4, 2, True),
        Block(64, 64, 4, 2, True, late=True),
        Block(64, 64, 4, 3, True, late=True),
        Block(128, 64, 8, 4, True, registers=128),
    ],
    ("query", 128): [
        Block(64, 64, 4, 2, True),
        Block(64, 64, 4, 2, True, late=True),
        Block(128, 64, 8, 4, True),
        Block(128, 64, 8, 3, True, late=True),
        Block(128, 64, 8, 4, True, late=True),
    ],
    ("key", 64): [Block(128, 64, 4, 2, True), Block(64, 64, 4, 2, True, registers=168)],
    ("key", 128): [Block(64, 64, 4, 2, True), *(Block(64, 128, 8, stages, True) for stages in (2, 3, 4))],
}
KERNELS = ("forward", "query", "key")
MASKS = (
    "causal",
    "causal_document",
    "random_eviction",
    "global_sliding_window",
    "prefix_lm_causal",
    "qk_sparse",
    "document",
    "sliding_window",
)


class Job(NamedTuple):
    d: int
    length: int
    mask: str
    kernel: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128], choices=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--masks", nargs="+", default=list(MASKS))
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rep", type=float, default=60, help="ms of repetitions a candidate")
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for all times, JSON lines")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which it stops")
    options = parser.parse_args()
    begin = time.monotonic()
    print(environment())
    jobs = [
        Job(d, length, mask, kernel)
        for kernel, d, length, mask in itertools.product(
            options.kernels, options.head_dims, options.lengths, options.masks
        )
    ]
    if options.warm:
        warm(jobs, options.warm)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    rows = []
    for job in jobs:
        if time.monotonic() - begin > options.limit:
            print(f"stopped at --limit before {job}")
            break
        rows += race(job, options.heads, options.rep)
        if options.out:
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def warm(jobs: Iterable[Job], processes: int) -> None:
    """Compile what the jobs need: a kernel is compiled for each number of intervals, with and without the diagonal."""
    found = {}
    for job in jobs:
        mask = _masks(1024)[job.mask]
        for block in candidates(job):
            found.setdefault((job.kernel, job.d, mask.num_intervals, mask.causal, block), (job, block))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(compile_candidate, *zip(*found.values(), strict=True)))


def compile_candidate(job: Job, block: Block) -> None:
    with contextlib.suppress(OutOfResources):
        Setting(job, heads=16, length=1024).run(block)


def race(job: Job, heads: int, rep: float) -> list[dict[str, object]]:
    """Prints and returns the times of all candidates that give the shipped block's result."""
    setting = Setting(job, heads)
    first = getattr(setting.shipped, job.kernel)
    expected = setting.run(first)
    times = {}
    for block in candidates(job):
        try:
            if not agree(setting.run(block), expected):
                print(*job, tuple(block), "WRONG", flush=True)
                continue
            times[block] = do_bench(lambda: setting.run(block), warmup=20, rep=rep, return_mode="median")  # noqa: B023
        except OutOfResources:
            continue
    rate = setting.flops / times[first] / 1e9
    print(f"{job.kernel} D {job.d} N {job.length} {job.mask}: {times[first]:.3f} ms, {rate:.0f} TFLOP/s")
    faster = sorted(times.items(), key=lambda item: item[1])
    print("   ", "  ".join(f"{name(block)} {times[first] / ms:.3f}" for block, ms in faster), flush=True)
    return [job._asdict() | {"block": list(block), "ms": ms, "shipped": block == first} for block, ms in times.items()]


def name(block: Block) -> str:
    """As 64x128w4s2TLr168: rows, columns, warps, stages, TMA, late, registers."""
    end = "" if block.registers is None else f"r{block.registers}"
    return f"{block.m}x{block.n}w{block.warps}s{block.stages}{'T' * block.tma}{'L' * block.late}{end}"


def agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether these outputs or gradients are those of the shipped block, but for rounding."""
    pairs = zip(results, expected, strict=True)
    return all(bool((a.float() - b.float()).abs().max() <= 0.02 * b.float().abs().max()) for a, b in pairs)


@lru_cache(maxsize=4)
def _masks(n: int) -> dict[str, FlashMask]:
    return {case.name: case.mask for case in cases(n)}


def shipped(job: Job) -> Blocks:
    mask = _masks(1024)[job.mask]
    return choose(torch.cuda.get_device_capability(), 2, job.d, mask.num_intervals, mask.causal, job.length)


def candidates(job: Job) -> list[Block]:
    """The shipped block, then the others, each once: `late` changes nothing where there are no intervals."""
    blocks = [getattr(shipped(job), job.kernel), *CANDIDATES[job.kernel, job.d]]
    if not _masks(1024)[job.mask].num_intervals:
        blocks = [block._replace(late=False) for block in blocks]
    return list(dict.fromkeys(blocks))


class Setting:
    """One kernel on one mask."""

    def __init__(self, job: Job, heads: int, length: int | None = None) -> None:
        length = length or job.length
        self.kernel, self.mask = job.kernel, _masks(length)[job.mask].to("cuda")
        batch = max(1, 32768 // length) if length == job.length else 1
        shape = (batch, length, heads, job.d)
        self.q, self.k, self.v, self.dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        work = {"forward": 1, "query": 1.5, "key": 2}[job.kernel]
        self.flops = work * 2 * 2 * job.d * heads * batch * int(self.mask.area().sum())
        self.scale = 1 / math.sqrt(job.d)
        self.shipped = shipped(job)
        if job.kernel != "forward":
            out, self.lse = self.run(self.shipped.forward, "forward")
            self.delta = portable.compute_delta(out, self.dout, None)

    def run(self, block: Block, kernel: str | None = None) -> tuple[Tensor, ...]:
        kernel = kernel or self.kernel
        chosen = self.shipped._replace(**{kernel: block})
        inputs = (self.q, self.k, self.v)
        with patch.object(portable, "choose", lambda *_: chosen):
            if kernel == "forward":
                return portable.forward(*inputs, self.mask, scale=self.scale, out_dtype=self.q.dtype)
            saved = (self.dout, *inputs, self.lse, self.delta, self.mask)
            if kernel == "query":
                return (portable.query_gradient(*saved, scale=self.scale, softcap=None, grad_dtype=self.q.dtype),)
            return portable.key_gradients(*saved, scale=self.scale, softcap=None, grad_dtype=self.q.dtype)


if __name__ == "__main__":
    main()
