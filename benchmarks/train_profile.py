"""Where a training step's time goes on one GPU: kernels by kind and by name, and how long the GPU stands still.

    python -m benchmarks.train_profile --shape 8b_eighth --n 131072 --variants compile compile,mlp_kept
    python -m benchmarks.train_profile --shape 8b_eighth --n 131072 --variants compile,loss_chunk=4096 --out <folder>

A variant is what differs from a plain cell of benchmarks/train.py: fields of `TrainCell`, with commas between them; one
without a value is set to true. Each is timed over `--steps` steps after two, and one more step is traced. All run in
one process, one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import train_run
from benchmarks.train_cells import SHAPES, TrainCell
from fm_longctx.train.estimate import Shape, step_flops

# The first kind whose words are in a kernel's name has it.
KINDS = {
    "attention": ("forward", "backward", "delta_", "scale_kernel", "statistics", "tile_", "query_gradient", "flash"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "compiled": ("triton_",),
    "matrices": ("nvjet", "gemm", "cutlass", "xmma", "cublas"),
    "softmax": ("softmax", "SoftMax"),
    "copies": ("memcpy", "memset", "copy", "Cat", "cat_", "split_with"),
    "sums": ("reduce",),
    "elementwise": ("elementwise",),
}

# Names of ranges over kernels, which are listed themselves.
_RANGES = ("ProfilerStep", "Optimizer.", "FSDP::", "#")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b_eighth", choices=list(SHAPES))
    parser.add_argument("--n", type=int, default=131072)
    parser.add_argument("--variants", nargs="+", default=["compile"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=25, help="kernels to name")
    parser.add_argument("--out", type=Path, help="folder for the traces, for Perfetto")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for variant in options.variants:
        try:
            describe(variant, options)
        except Exception as error:
            print(f"{variant}: failed: {' '.join(str(error).split())[:400]}", flush=True)
            if "CUDA" in str(error) and "out of memory" not in str(error):
                raise
        train_run.free()


def cell_of(variant: str, shape: str, n: int) -> TrainCell:
    """The cell that a variant names.

    Raises:
        ValueError: a name that is none of `TrainCell`'s.
    """
    changes: dict[str, Any] = {}
    for part in variant.split(","):
        name, _, value = part.partition("=")
        changes[name] = True if not value else int(value) if value.isdigit() else value
    try:
        return replace(TrainCell(section="profile", shape=shape, n=n, arms=("ours",)), **changes)
    except TypeError as error:
        raise ValueError(f"--variants {variant}: {error}.") from None


def describe(variant: str, options: argparse.Namespace) -> None:
    """Print a variant's speed, and the parts of one step of it."""
    cell = cell_of(variant, options.shape, options.n)
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    torch.manual_seed(0)
    model, optimizer = train_run.prepare(cell.config(options.device), "ours")
    dtype = torch.float32 if cell.precision == "float32" else torch.bfloat16
    batches = itertools.islice(train_run.batches(cell, Shape.of(model.causal_lm.config).vocabulary), options.steps + 3)

    def step(lengths: list[int], tokens: torch.Tensor) -> float:
        _wait(on_gpu)
        begin = time.perf_counter()
        train_run.train_step("ours", model, optimizer, lengths, tokens, device, dtype)
        _wait(on_gpu)
        return time.perf_counter() - begin

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    *timed, last = batches
    seconds = [step(*batch) for batch in timed]
    shape = Shape.of(model.causal_lm.config)
    flops = sum(step_flops(shape, cell.n, _area(lengths)) for lengths, _ in timed[2:])
    rate, spent = flops / sum(seconds[2:]) / 1e12, sum(seconds[2:])
    peak = f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
    print(
        f"== {options.shape} n{cell.n} {variant}: {cell.n * options.steps / spent:,.0f} tokens/s, {rate:.1f} TFLOP/s, "
        f"MFU {rate / 989:.1%}, first step {seconds[0]:.1f} s, then {' '.join(f'{s:.3f}' for s in seconds[1:])}"
        f"{peak}",
        flush=True,
    )
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        whole = step(*last)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(options.out / f"{options.shape}-{variant.replace(',', '-')}.json.gz"))
    if on_gpu:
        report(trace, whole, options.top)


def _area(lengths: list[int]) -> float:
    return sum(n * (n + 1) / 2 for n in lengths)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def report(trace: Any, seconds: float, top: int) -> None:
    """The traced step's kernels, by kind and by name."""
    by_name: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans, host = [], []
    for event in trace.events():
        span = event.time_range
        if event.device_type != DeviceType.CUDA:
            host.append((span.start, span.end, event.name))
        elif not event.name.startswith(_RANGES):
            by_name[event.name] += span.elapsed_us()
            calls[event.name] += 1
            spans.append((span.start, span.end, event.name))
    spans.sort()
    first, end, before = spans[0]
    busy = end - first
    pauses = [(first - min(start for start, *_ in host), first, "", before)]
    for begin, stop, name in spans[1:]:
        busy += max(0.0, stop - max(begin, end))
        if begin > end:
            pauses.append((begin - end, begin, before, name))
        if stop > end:
            end, before = stop, name
    kinds: Counter[str] = Counter()
    for name, spent in by_name.items():
        kinds[next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")] += spent
    print(f"step {seconds * 1e3:.0f} ms under the profiler, GPU busy {busy / 1e3:.0f} ms")
    print("  " + ", ".join(f"{kind} {spent / 1e3:.0f} ms" for kind, spent in kinds.most_common()))
    for name, spent in by_name.most_common(top):
        print(f"  {spent / 1e3:8.1f} ms {calls[name]:5d}x  {name[:110]}")
    print(f"  pauses: {len(pauses)}, in all {sum(length for length, *_ in pauses) / 1e3:.0f} ms; the longest:")
    for length, until, last, following in sorted(pauses, reverse=True)[:10]:
        at = until - length / 2
        # What the host was in, innermost first.
        doing = sorted((stop - start, name) for start, stop, name in host if start <= at <= stop)
        names = " < ".join(name[:40] for _, name in doing[:4])
        print(f"  {length / 1e3:8.1f} ms before {until / 1e3:.0f}: {last[:30]} | {following[:30]} | host: {names}")


if __name__ == "__main__":
    main()
