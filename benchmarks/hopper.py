"""Which configuration of the Hopper forward is fastest? Checks each against the portable kernel, then times it.

python -m benchmarks.hopper --head-dims 64 128 256
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from benchmarks.cases import document_lengths
from benchmarks.environment import environment
from fm_longctx.kernels import portable
from fm_longctx.kernels.hopper import launch
from fm_longctx.mask import FlashMask, builders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--block-n", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--q-in-registers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--consumers", type=int, nargs="+", choices=[2, 3], help="the shipped number if not given")
    parser.add_argument(
        "--masks", nargs="+", default=["causal", "full", "causal_document", "document", "random_eviction"]
    )
    options = parser.parse_args()
    print(environment())
    n = options.length
    masks = {
        "causal": builders.causal(n),
        "full": builders.full(n),
        "causal_document": builders.causal_document(document_lengths(n, 0)),
        "document": builders.document(document_lengths(n, 0)),
        "random_eviction": builders.random_eviction(n),
    }
    for d in options.head_dims:
        for name in options.masks:
            shipped = launch.forward_config(d, masks[name].num_intervals)
            for block_n, stages, in_registers, consumers in itertools.product(
                options.block_n, options.stages, options.q_in_registers, options.consumers or [shipped.consumers]
            ):
                config = shipped._replace(
                    block_n=block_n, stages=stages, q_in_registers=bool(in_registers), consumers=consumers
                )
                time_config(config, name, masks[name].to("cuda"), n, options.heads, d)


def time_config(config: launch.Config, name: str, mask: FlashMask, n: int, heads: tuple[int, int], d: int) -> None:
    h, h_kv = heads
    q, k, v = (torch.randn(1, n, x, d, device="cuda", dtype=torch.bfloat16) for x in (h, h_kv, h_kv))
    flops = 2 * 2 * d * h * int(mask.area().sum())
    scale = 1 / math.sqrt(d)
    expected, expected_lse = portable.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return launch.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)

    kept, launch.forward_config = launch.forward_config, lambda *_: config
    label = f"D {d:3} {name:16} {config!s:74}"
    try:
        out, lse = run()
        error = (out.float() - expected.float()).abs().max().item()
        lse_error = (lse - expected_lse).abs().max().item()
        if error <= 0.02 and lse_error <= 1e-3:
            ms = do_bench(run, warmup=20, rep=100, return_mode="median")
            print(f"{label} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)
        else:
            print(f"{label} WRONG: out {error:.3g} lse {lse_error:.3g}", flush=True)
    except OutOfResources:
        print(f"{label} more shared memory than there is", flush=True)
    finally:
        launch.forward_config = kept


if __name__ == "__main__":
    main()
