"""Which block shapes are fastest? Times candidates of the portable kernels; the winners stand in kernels/blocks.py.

    python -m benchmarks.blocks --head-dims 64 128 256

Causal and packed causal documents at 32K tokens, bf16, 16 heads. Forward, dQ and dK/dV kernels are timed apart.
"""

from __future__ import annotations

import argparse
import math

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from benchmarks.cases import document_lengths
from benchmarks.environment import environment
from fm_longctx.kernels import portable
from fm_longctx.kernels.blocks import Block, Blocks
from fm_longctx.kernels.schedule import tile_runs
from fm_longctx.mask import FlashMask, builders

FORWARD = [
    *(Block(128, n, 8, s) for n in (64, 128) for s in (2, 3)),
    *(Block(64, n, 4, s) for n in (64, 128) for s in (2, 3)),
    *(Block(128, n, 4, s) for n in (32, 64) for s in (2, 3)),
]
QUERY = [
    *(Block(128, n, 8, s) for n in (32, 64, 128) for s in (1, 2, 3)),
    *(Block(64, n, 4, s) for n in (32, 64) for s in (1, 2, 3)),
]
KEY = [
    *(Block(m, 128, 8, s) for m in (32, 64) for s in (1, 2, 3)),
    *(Block(m, 64, 4, s) for m in (32, 64) for s in (1, 2, 3)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=16)
    options = parser.parse_args()
    print(environment())
    n, h = options.length, options.heads
    for d in options.head_dims:
        for name, mask in (
            ("causal", builders.causal(n)),
            ("causal_document", builders.causal_document(document_lengths(n, 0))),
        ):
            time_candidates(name, mask.to("cuda"), n, h, d)


def time_candidates(name: str, mask: FlashMask, n: int, h: int, d: int) -> None:
    q, k, v, dout = (torch.randn(1, n, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    flops = 2 * 2 * d * h * int(mask.area().sum())
    scale = 1 / math.sqrt(d)
    default = portable.choose(torch.cuda.get_device_capability(), 2, d)
    out, lse = portable.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()

    def forward() -> None:
        portable.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)

    def query() -> None:
        portable.query_gradient(dout, q, k, v, lse, delta, mask, scale=scale, grad_dtype=q.dtype)

    def key() -> None:
        portable.key_gradients(dout, q, k, v, lse, delta, mask, scale=scale, grad_dtype=q.dtype)

    for kernel, run, candidates, work in (
        ("forward", forward, FORWARD, flops),
        ("query", query, QUERY, 1.5 * flops),
        ("key", key, KEY, 2 * flops),
    ):
        times = {}
        for block in candidates:
            chosen: Blocks = default._replace(**{kernel: block})
            portable.choose, kept = (lambda *_, chosen=chosen: chosen), portable.choose
            try:
                tile_runs(mask, block.m, block.n, by_row=kernel != "key")
                times[block] = do_bench(run, warmup=20, rep=80, return_mode="median")
            except OutOfResources:
                continue
            finally:
                portable.choose = kept
        for block, ms in sorted(times.items(), key=lambda item: item[1])[:5]:
            print(f"D {d:3} {name:16} {kernel:8} {block!s:52} {ms:8.3f} ms {work / ms / 1e9:6.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
