"""Many processes on one GPU, each repeating one pass of a backend for itself, bit for bit.

    python -m tests.attention.crowd --processes 12 --seconds 30

Alone on a card kernels run undisturbed; beside others they are interrupted in the middle. A fault of an earlier Hopper
kernel showed only so (benchmarks/notes/hopper.md). The passes go round the processes: forward and the deterministic
backward must repeat all bits, the other backward those of dK and dV. Exits with 1 if one differs or fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from itertools import product

import torch
from torch import Tensor

from fm_longctx import FlashMask
from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward
from fm_longctx.mask import causal_document, sliding_window
from tests.attention.oracle import DEVICE, random_inputs
from tests.attention.variants import gpu_backends

PASSES = ("forward", "backward", "deterministic backward")
# Repetitions that are in flight before one is compared.
QUEUED = 15


def documents(n: int) -> FlashMask:
    return causal_document([n // 2, n // 3, n - n // 2 - n // 3])


# Lists of all lengths, and lists of one length.
MASKS = {"documents": documents, "window": lambda n: sliding_window(n, max(1, n // 16))}


def repeat(task: tuple[str, str, str, int], seconds: float, sizes: tuple[int, ...]) -> str:
    """The pass over and over; what it came to, beginning with "right" if nothing was wrong.

    task: backend, pass, mask, D.
    """
    backend, name, mask_name, d = task
    scale = d**-0.5
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    calls = 0

    def run(mask: FlashMask, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        if name == "forward":
            return attention_forward(q, k, v, mask, scale=scale, backend=backend)
        delta = attention_delta(out, q, backend=backend)
        deterministic = name != "backward"
        options = {"scale": scale, "backend": backend, "deterministic": deterministic}
        gradients = attention_backward(q, q, k, v, lse, delta, mask, **options)
        return gradients if deterministic else gradients[1:]

    try:
        cases = []
        for seed, n in enumerate(sizes):
            mask = MASKS[mask_name](n).to(DEVICE)
            q, k, v = random_inputs(rows=n, heads=32, kv_heads=8, d=d, dtype=dtype, seed=seed)
            cases.append((mask, q, k, v, *attention_forward(q, k, v, mask, scale=scale, backend=backend)))
        wanted = [run(*case) for case in cases]
        end = time.monotonic() + seconds
        while not calls or time.monotonic() < end:
            for case, want in zip(cases, wanted, strict=True):
                for _ in range(QUEUED if DEVICE == "cuda" else 1):
                    got = run(*case)
                    calls += 1
                if not all(map(torch.equal, got, want)):
                    return f"WRONG after {calls} calls: other bits than at first"
    except Exception as error:  # a lost CUDA context among them
        return f"FAILED after {calls} calls: {' '.join(str(error).split())[:120]}"
    return f"right, {calls} calls"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30.0, help="of repeating, after what must be compiled")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 2048, 3000], help="rows and columns")
    options = parser.parse_args(arguments)
    tasks = [(backend, name, mask, d) for d, mask, backend, name in product((128, 64), MASKS, gpu_backends(), PASSES)]
    tasks = [tasks[i % len(tasks)] for i in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = [pool.apply_async(repeat, (task, options.seconds, tuple(options.sizes))) for task in tasks]
        told = [result.get() for result in results]
    for (backend, name, mask, d), said in zip(tasks, told, strict=True):
        print(f"{backend}, {name}, {mask}, D {d}: {said}")
    if not all(said.startswith("right") for said in told):
        sys.exit(1)


if __name__ == "__main__":
    main()
