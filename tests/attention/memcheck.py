"""A small suite for compute-sanitizer: every kind of mask, odd lengths, forward and backward, each result checked.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.attention.memcheck

Run it once without the sanitizer first: Triton then compiles its kernels at full speed and keeps them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

# Every tensor in an allocation of its own: within PyTorch's large blocks a stray access would go unseen.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from fm_longctx import flashmask_attention
from fm_longctx.attention.passes import load_backend
from tests.attention.oracle import DEVICE, check, random_inputs
from tests.attention.variants import Variant, gpu_backends, interval_variants, rule_variants

BATCH, HEADS, KV_HEADS = 2, 4, 2
DIMENSIONS = {64: torch.bfloat16, 80: torch.float16, 128: torch.bfloat16, 32: torch.float32}


def variants(n: int) -> Iterator[Variant]:
    """Every kind of mask at about n rows and columns, none a multiple of a tile."""
    yield from rule_variants(n)
    for rows, columns in ((n, n), (n, n // 2 + 2), (n // 2 + 2, n)):
        yield from interval_variants(rows, columns, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS)


def run(variant: Variant, backend: str, d: int, dtype: torch.dtype) -> bool:
    """Check one mask, forward and backward; False if the backend does not take it."""
    mask, visible = variant.mask.to(DEVICE), variant.visible.to(DEVICE)
    shape = {"batch": BATCH, "heads": HEADS, "kv_heads": KV_HEADS, "d": d, "dtype": dtype}
    q, k, v = random_inputs(rows=mask.num_rows, columns=mask.num_columns, **shape)
    if load_backend(backend).refusal(q, v, mask.num_intervals, None) is not None:
        return False

    def attend(q, k, v):
        return flashmask_attention(q, k, v, mask, return_lse=True, backend=backend)

    check(attend, q, k, v, visible, 1 / math.sqrt(d))
    return True


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("memcheck needs an NVIDIA GPU: Triton's interpreter checks no address.")
    every = list(variants(197))
    for backend in gpu_backends():
        for d, dtype in DIMENSIONS.items():
            ran = [run(variant, backend, d, dtype) for variant in every]
            print(f"{backend}, D {d}, {dtype}: {sum(ran)} of {len(ran)} masks run and right", flush=True)


if __name__ == "__main__":
    main()
