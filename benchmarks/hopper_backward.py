"""Which configuration of the Hopper backward is fastest? Checks each against the portable kernels, then times it.

    python -m benchmarks.hopper_backward --head-dims 64 128

Fused and split (deterministic) form at any number of grouped heads, and the portable backward beside them.
delta is ready-made; dQ's zeros, its conversion and the statistics are part of the time. TFLOP/s count 2.5 times the
forward's operations over the mask's area.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from benchmarks.cases import document_lengths
from benchmarks.environment import environment
from fm_longctx.kernels import portable
from fm_longctx.kernels.hopper import launch
from fm_longctx.mask import FlashMask, builders

CANDIDATES = {
    64: [launch.BackwardConfig(128, 2, ahead, ahead) for ahead in (False, True)],
    128: [launch.BackwardConfig(64, stages, ahead, ahead) for stages in (2, 3) for ahead in (False, True)],
}
# Of the largest gradient: a few units of bfloat16.
TOLERANCE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 16, 64, 8], help="pairs: query, key/value heads")
    parser.add_argument("--masks", nargs="+", default=["causal", "full", "causal_document", "document"])
    options = parser.parse_args()
    print(environment())
    n = options.length
    lengths = document_lengths(n, 0)
    masks = {
        "causal": builders.causal(n),
        "full": builders.full(n),
        "causal_document": builders.causal_document(lengths),
        "document": builders.document(lengths),
    }
    for d in options.head_dims:
        for heads in zip(options.heads[::2], options.heads[1::2], strict=True):
            for name in options.masks:
                time_case(f"D {d:3} {heads[0]:2}:{heads[1]:<2} {name:16}", masks[name].to("cuda"), n, heads, d)


def time_case(label: str, mask: FlashMask, n: int, heads: tuple[int, int], d: int) -> None:
    h, h_kv = heads
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, n, x, d, device="cuda", dtype=torch.bfloat16) for x in (h, h_kv, h_kv, h))
    flops = 2.5 * 2 * 2 * d * h * int(mask.area().sum())
    scale = 1 / math.sqrt(d)
    out, lse = portable.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()
    arguments = (dout, q, k, v, lse, delta, mask)

    def reference() -> tuple[Tensor, Tensor, Tensor]:
        return portable.backward(*arguments, scale=scale, grad_dtype=q.dtype)

    expected = reference()
    ms = do_bench(reference, warmup=20, rep=100, return_mode="median")
    print(f"{label} {'portable':36} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)
    kept = launch.BACKWARD[d]
    for deterministic in (False, True):
        for config in CANDIDATES[d]:
            launch.BACKWARD[d] = config

            def run(deterministic: bool = deterministic) -> tuple[Tensor, Tensor, Tensor]:
                return launch.backward(*arguments, scale=scale, grad_dtype=q.dtype, deterministic=deterministic)

            form = f"{'split' if deterministic else 'fused':13} M {config.block_m:3} stages {config.stages}"
            form += " ahead" if config.ahead else ""
            try:
                errors = [_error(got, want) for got, want in zip(run(), expected, strict=True)]
                if max(errors) <= TOLERANCE:
                    ms = do_bench(run, warmup=20, rep=100, return_mode="median")
                    print(f"{label} {form:36} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)
                else:
                    dq, dk, dv = errors
                    print(f"{label} {form:36} WRONG: dq {dq:.3g} dk {dk:.3g} dv {dv:.3g}", flush=True)
            except OutOfResources:
                print(f"{label} {form:36} more shared memory than there is", flush=True)
            finally:
                launch.BACKWARD[d] = kept


def _error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value; NaN counts as infinite."""
    error = ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()
    return error if error == error else math.inf


if __name__ == "__main__":
    main()
