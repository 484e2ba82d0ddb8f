"""What does each stage of the Hopper kernels cost? Times variants that leave one out; their results are wrong.

    python -m benchmarks.hopper_stages

A variant is the kernel's own source with a few lines changed, so that it cannot drift from what is shipped: where a
line is not found any more, it raises. All variants of a mask in turn, several rounds, medians; with the card's clock
and power, since on long lists that is what limits it. Without copies, the products are of what the variant before left
in shared memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.cases import document_lengths
from benchmarks.environment import environment
from fm_longctx.kernels.hopper import backward, forward, launch, softmax
from fm_longctx.mask import builders

Changes = tuple[tuple[str, str], ...]
# Where steps of a kernel stand that are in a file of their own: by the kernel's module.
STEPS = {forward: softmax}
# What of the forward's loop is left out. Its first and last tile are as they were.
FORWARD: dict[str, Changes] = {
    "all": (),
    "no exponentials": (("p = gl.exp2(s * scale_log2 - ", "p = (s * scale_log2 - "),),
    "anchors never rise": (("b_next = raise_anchors(b_top, split_sum, S_ROW)", "b_next = b_top"),),
    "no sums": (("b_sum * split_decay + sum_in_thread(p, 64, BLOCK_N), b_decay", "b_sum * split_decay, b_decay"),),
    "no decay of O": (
        ("b_out = scale_rows(b_out, gl.convert_layout(b_decay, O_ROW))\n", "pass\n"),
        ("b_out = b_out * gl.expand_dims(gl.convert_layout(b_decay, O_ROW), 1)\n", "pass\n"),
    ),
    "no P V": (
        (
            "token = warpgroup_mma(p, v, b_out, is_async=True)\n                s = warpgroup_mma_wait(1, deps=(s,))",
            "s = warpgroup_mma_wait(0, deps=(s,))",
        ),
        ("b_out = warpgroup_mma_wait(0, deps=(token,))\n                mbarrier", "mbarrier"),
    ),
    "no copies of K and V": (
        (
            "        mbarrier.expect(full.index(stage), size + bounds_desc.block_type.nbytes, pred=partial != 0)\n"
            "        mbarrier.expect(full.index(stage), size, pred=partial == 0)\n",
            "        mbarrier.expect(full.index(stage), bounds_desc.block_type.nbytes, pred=partial != 0)\n"
            "        mbarrier.arrive(full.index(stage), count=1, pred=partial == 0)\n",
        ),
        (
            "    else:\n        mbarrier.expect(full.index(stage), size)\n",
            "    else:\n        mbarrier.arrive(full.index(stage), count=1)\n",
        ),
        (
            "        tma.async_copy_global_to_shared(k_desc, [b, n0, h_kv, 0], full.index(stage), k_s.index(stage))\n",
            "        pass\n",
        ),
        (
            "        tma.async_copy_global_to_shared(v_desc, [b, before * BLOCK_N, h_kv, 0], full.index(stage),"
            " v_s.index(stage))\n",
            "        pass\n",
        ),
    ),
}
FORWARD["no softmax"] = tuple(change for name in list(FORWARD)[1:5] for change in FORWARD[name])
BACKWARD: dict[str, Changes] = {
    "all": (),
    "no exponentials": (("p = gl.exp2(s * scale_log2 - ", "p = (s * scale_log2 - "),),
    "dQ stored, not added": (("tma_reduce_add(dq_desc", "tma.async_copy_shared_to_global(dq_desc"),),
    "dS not exchanged": (("                meet(DS_FULL, CONSUMERS)\n", ""),),
    "no dQ": (),
    "no copies of Q and dO": (
        ("mbarrier.expect(bar, size)", "mbarrier.expect(bar, stats_desc.block_type.nbytes)"),
        ("    tma.async_copy_global_to_shared(q_desc, [b, tile * BLOCK_M, h, 0], bar, q_s.index(stage))\n", ""),
        ("    tma.async_copy_global_to_shared(dout_desc, [b, tile * BLOCK_M, h, 0], bar, dout_s.index(stage))\n", ""),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", nargs="+", default=["causal", "full", "causal_document"])
    options = parser.parse_args()
    print(environment())
    n, h, d = options.length, options.heads, options.head_dim
    masks = {
        "causal": builders.causal(n),
        "full": builders.full(n),
        "causal_document": builders.causal_document(document_lengths(n, 0)),
    }
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, n, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    scale = 1 / math.sqrt(d)
    with tempfile.TemporaryDirectory() as folder:
        forwards = {name: variant(forward, x, Path(folder)).forward_kernel for name, x in FORWARD.items()}
        backwards = {name: variant(backward, x, Path(folder)).backward_kernel for name, x in BACKWARD.items()}
        for name in options.masks:
            mask = masks[name].to("cuda")
            flops = 4 * d * h * int(mask.area().sum())
            out, lse = launch.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)
            delta = launch.compute_delta(out, dout, None)

            def run_forward(stage: str, mask=mask) -> None:
                with replaced("forward_kernel", forwards[stage]):
                    launch.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)

            def run_backward(stage: str, mask=mask, lse=lse, delta=delta) -> None:
                fused = stage != "no dQ"
                with (
                    replaced("backward_kernel", backwards[stage]),
                    replaced("_fused", lambda *_: fused),
                    replaced("_query_gradient", lambda *_: None),
                ):
                    launch.backward(dout, q, k, v, lse, delta, mask, scale=scale, grad_dtype=q.dtype)

            report(f"forward {name}", list(FORWARD), run_forward, flops, options.rounds)
            report(f"backward {name}", list(BACKWARD), run_backward, 2.5 * flops, options.rounds)


def variant(module: ModuleType, changes: Changes, folder: Path) -> ModuleType:
    """The module, and its steps, with each text replaced wherever it stands; one that is not there is a ValueError."""
    source, steps = _source(module), _source(STEPS[module]) if module in STEPS else ""
    for old, new in changes:
        if old not in source + steps:
            raise ValueError(f"{module.__file__} has no {old!r} any more: change {__name__} along with the kernel")
        source, steps = source.replace(old, new), steps.replace(old, new)
    name = f"variant_{len(list(folder.iterdir()))}"
    if module in STEPS and steps != _source(STEPS[module]):
        _load(f"{name}_steps", steps, folder)
        source = source.replace(f"from {STEPS[module].__name__} import", f"from {name}_steps import")
    return _load(name, source, folder)


def _source(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text()


def _load(name: str, source: str, folder: Path) -> ModuleType:
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def replaced(name: str, value: object) -> Iterator[None]:
    kept = getattr(launch, name)
    setattr(launch, name, value)
    try:
        yield
    finally:
        setattr(launch, name, kept)


def report(label: str, stages: Sequence[str], run: Callable[[str], None], flops: float, rounds: int) -> None:
    times: dict[str, list[float]] = {stage: [] for stage in stages}
    states = dict.fromkeys(stages, "")
    for stage in stages:
        run(stage)
    for _ in range(rounds):
        for stage in stages:
            ms, states[stage] = burst(lambda stage=stage: run(stage))
            times[stage].append(ms)
    whole = statistics.median(times[stages[0]])
    for stage in stages:
        ms = statistics.median(times[stage])
        print(
            f"{label:24} {stage:24} {ms:8.3f} ms {ms / whole:5.2f} {flops / ms / 1e9:6.0f} TFLOP/s as if whole, "
            f"{states[stage]}",
            flush=True,
        )


def burst(run: Callable[[], None], seconds: float = 0.25) -> tuple[float, str]:
    """Milliseconds of a run among many without a pause, and the card's clock and power in their midst."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    count = max(3, int(1000 * seconds / start.elapsed_time(end)))
    start.record()
    for _ in range(count):
        run()
    end.record()
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    state = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count, state


if __name__ == "__main__":
    main()
