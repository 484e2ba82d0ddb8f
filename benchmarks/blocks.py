"""Which block shapes are fastest? Times candidates of the portable kernels; the winners stand in kernels/blocks.py.

    python -m benchmarks.blocks --head-dims 64 128 256 --warm 12

Causal, packed causal documents, random eviction (all tiles partial) and a global sliding window (two intervals a
column) at 32K tokens, bf16, 16 heads. Forward, dQ and dK/dV kernels are timed apart; a candidate whose result is not
that of the shipped block is reported instead. With `--warm`, that many processes first compile all candidates, so that
the timing one finds them in Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from benchmarks.cases import document_lengths
from benchmarks.environment import environment
from fm_longctx.kernels import portable
from fm_longctx.kernels.blocks import Block
from fm_longctx.mask import FlashMask, builders

TMA = (False, True)
FORWARD = [
    *(Block(128, n, 8, s, tma) for n in (64, 128) for s in (2, 3) for tma in TMA),
    *(Block(m, 64, 4, s, tma) for m in (64, 128) for s in (2, 3) for tma in TMA),
    *(Block(64, 32, 4, s, True) for s in (3, 4)),
]
QUERY = [
    *(Block(128, 64, 8, s, tma) for s in (2, 3, 4) for tma in TMA),
    *(Block(128, 32, 8, s, True) for s in (2, 3)),
    *(Block(64, n, 4, s, tma) for n in (32, 64) for s in (2, 3) for tma in TMA),
    *(Block(128, 64, 4, s, True) for s in (2, 3)),
    Block(64, 64, 8, 2, True),
    Block(64, 32, 8, 1),
]
KEY = [
    *(Block(m, 128, 8, s, tma) for m in (32, 64) for s in (2, 3, 4) for tma in TMA),
    *(Block(m, 64, 4, s, tma) for m in (32, 64) for s in (2, 3) for tma in TMA),
    *(Block(128, 64, 4, s, True) for s in (2, 3)),
    *(Block(32, 64, 8, s, tma) for s in (1, 2) for tma in TMA),
]
CANDIDATES = {"forward": FORWARD, "query": QUERY, "key": KEY}
MASKS: dict[str, Callable[[int], FlashMask]] = {
    "causal": builders.causal,
    "causal_document": lambda n: builders.causal_document(document_lengths(n, 0)),
    "random_eviction": lambda n: builders.random_eviction(n),
    "global_sliding_window": lambda n: builders.global_sliding_window(n, 16, n // 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kernels", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--warm", type=int, default=0)
    options = parser.parse_args()
    print(environment())
    jobs = list(itertools.product(options.head_dims, MASKS, options.kernels))
    if options.warm:
        # Random eviction has the kernels of packed documents.
        each = [(job, block) for job in jobs if job[1] != "random_eviction" for block in CANDIDATES[job[2]]]
        with ProcessPoolExecutor(options.warm, get_context("spawn")) as pool:
            list(pool.map(compile_candidate, *zip(*each, strict=True)))
    for d, mask_name, kernel in jobs:
        setting = Setting(d, mask_name, kernel, options.length, options.heads)
        expected = setting.run(getattr(setting.default, kernel))
        times = {}
        for block in CANDIDATES[kernel]:
            try:
                if not agree(setting.run(block), expected):
                    print(f"D {d:3} {mask_name:21} {kernel:8} {block!s} WRONG", flush=True)
                    continue
                times[block] = do_bench(lambda: setting.run(block), warmup=20, rep=60, return_mode="median")  # noqa: B023
            except OutOfResources:
                continue
        for block, ms in sorted(times.items(), key=lambda item: item[1])[:5]:
            rate = setting.flops / ms / 1e9
            print(f"D {d:3} {mask_name:21} {kernel:8} {block!s:62} {ms:8.3f} ms {rate:6.0f} TFLOP/s", flush=True)


def compile_candidate(job: tuple[int, str, str], block: Block) -> None:
    with contextlib.suppress(OutOfResources):
        Setting(*job, length=1024, heads=16).run(block)


def agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether these outputs or gradients are those of the shipped block, but for rounding."""
    pairs = zip(results, expected, strict=True)
    return all(bool((a.float() - b.float()).abs().max() <= 0.02 * b.float().abs().max()) for a, b in pairs)


class Setting:
    """One kernel on one mask."""

    def __init__(self, d: int, mask: str, kernel: str, length: int, heads: int) -> None:
        self.kernel, self.mask = kernel, MASKS[mask](length).to("cuda")
        self.q, self.k, self.v, self.dout = (
            torch.randn(1, length, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        work = {"forward": 1, "query": 1.5, "key": 2}[kernel]
        self.flops = work * 2 * 2 * d * heads * int(self.mask.area().sum())
        self.scale = 1 / math.sqrt(d)
        self.default = portable.choose(torch.cuda.get_device_capability(), 2, d, self.mask.num_intervals)
        if kernel != "forward":
            out, self.lse = self.run(self.default.forward, "forward")
            self.delta = portable.compute_delta(out, self.dout, None)

    def run(self, block: Block, kernel: str | None = None) -> tuple[Tensor, ...]:
        kernel = kernel or self.kernel
        chosen = self.default._replace(**{kernel: block})
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
