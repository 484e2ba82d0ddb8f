"""The Hopper kernels with random delays at every barrier, many times over, against an undisturbed run, bit for bit.

    python -m tests.attention.racecheck --head-dim 128 --intervals 1 --causal --seconds 60
    compute-sanitizer --tool racecheck python -m tests.attention.racecheck --head-dim 128 --quiet --seconds 20

Each round draws sizes and a mask. Before each wait and each arrival at a barrier every warp sleeps for as long as a
hash of its clock says, so that producer and consumers meet in orders that a quiet GPU would not show. What has one
writer (output, lse, dK, dV, and all of the deterministic backward) must be the same bits; dQ, if summed as tiles come,
must agree within rounding. With --quiet the kernels are the shipped ones, repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
import time
import types
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fm_longctx import FlashMask
from fm_longctx.kernels.hopper import backward, forward, launch, primitives, query_gradient
from tests.attention.oracle import DEVICE, random_inputs

# Up to 2 microseconds: some tiles.
SLEEP = """{
    .reg .u32 time;
    mov.u32 time, %clock;
    mul.lo.u32 time, time, 2654435761;
    shr.u32 time, time, 21;
    nanosleep.u32 time;
    mov.u32 $0, $1;
}"""
# Few, since each is compiled for itself where a number of blocks is 1 or a multiple of 16.
SIZES = (77, 333, 511, 777, 1025, 1499)
LATE = {"forward_kernel": forward, "backward_kernel": backward, "query_gradient_kernel": query_gradient}


def late(step: Callable[..., None]) -> Callable[..., None]:
    """A step of Gluon's that comes late."""

    def late_step(*args, _semantic=None, **options):
        gl.inline_asm_elementwise(
            SLEEP, "=r,r", [_semantic.to_tensor(0)], gl.int32, is_pure=False, pack=1, _semantic=_semantic
        )
        step(*args, **options, _semantic=_semantic)

    return builtin(late_step)


def delayed_barriers() -> types.ModuleType:
    """Gluon's mbarrier module, whose waits and arrivals come late."""
    barriers = types.ModuleType("late_mbarrier")
    vars(barriers).update({name: getattr(mbarrier, name) for name in mbarrier.__all__})
    for name in ("wait", "arrive", "expect"):
        setattr(barriers, name, late(getattr(mbarrier, name)))
    return barriers


def use_late_kernels() -> None:
    """Have the launches take kernels of the same source whose barriers are late."""
    changes = {"mbarrier": delayed_barriers(), "meet": late(primitives.meet), "announce": late(primitives.announce)}
    for name, module in LATE.items():
        spec = importlib.util.spec_from_file_location(f"late_{name}", module.__file__)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        vars(copy).update({key: value for key, value in changes.items() if key in vars(copy)})
        setattr(launch, name, getattr(copy, name))


def assert_late() -> None:
    """That what ran is what was to run: every kernel that the launches have compiled sleeps."""
    for name in LATE:
        kernels = [kernel for caches in getattr(launch, name).device_caches.values() for kernel in caches[0].values()]
        assert kernels, f"{name} did not run"
        assert all("nanosleep.u32 time" in kernel.asm["ptx"] for kernel in kernels), f"{name} does not sleep"


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: FlashMask) -> dict[str, Tensor]:
    out, lse = launch.forward(q, k, v, mask, scale=0.1, out_dtype=q.dtype)
    delta = launch.compute_delta(out, dout, None)
    found = {"out": out, "lse": lse}
    for form in ("fused", "deterministic"):
        grads = launch.backward(
            dout, q, k, v, lse, delta, mask, scale=0.1, grad_dtype=q.dtype, deterministic=form == "deterministic"
        )
        found |= {f"{form} {name}": x for name, x in zip(("dq", "dk", "dv"), grads, strict=True)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128, choices=[64, 128])
    parser.add_argument("--intervals", type=int, default=1, choices=range(4))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no delays")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # One source makes two binaries, which the compiler's cache cannot tell apart: one each, and none that lasts.
    with tempfile.TemporaryDirectory() as quiet, tempfile.TemporaryDirectory() as late:
        triton.knobs.cache.dir = quiet
        repeat(options, late)


def repeat(options: argparse.Namespace, late_cache: str) -> None:
    generator = random.Random(options.seed)
    torch.manual_seed(options.seed)
    cases, expected = [], []
    for rows, columns in [(generator.choice(SIZES), generator.choice(SIZES)) for _ in range(12)]:
        bounds = torch.randint(0, rows + 1, (2, 1, 1, options.intervals, columns), dtype=torch.int32)
        mask = FlashMask(bounds.amin(0), bounds.amax(0), causal=options.causal, num_rows=rows).to(DEVICE)
        shape = {"batch": 2, "heads": 6, "kv_heads": 3, "d": options.head_dim, "dtype": torch.bfloat16}
        q, k, v = random_inputs(rows=rows, columns=columns, **shape)
        cases.append((q, k, v, torch.randn_like(q), mask))
        expected.append(run(*cases[-1]))
    if not options.quiet:
        triton.knobs.cache.dir = late_cache
        use_late_kernels()
    started, rounds = 0.0, 0
    while not started or time.monotonic() - started < options.seconds:
        for case, want in zip(cases, expected, strict=True):
            compare(run(*case), want, f"round {rounds}, {list(case[0].shape)}, {case[1].shape[1]} columns")
            rounds += 1
        # The first turn compiles.
        started = started or time.monotonic()
    if not options.quiet:
        assert_late()
    print(f"D {options.head_dim}, K {options.intervals}, causal {options.causal}: {rounds} rounds, the same bits")


def compare(got: dict[str, Tensor], want: dict[str, Tensor], label: str) -> None:
    for name, x in want.items():
        if name == "fused dq":
            worst = (got[name].float() - x.float()).abs().max().item()
            assert worst <= 0.01 * x.float().abs().max().item() + 1e-6, f"{label}: {name} differs by {worst}"
        else:
            assert torch.equal(got[name], x), f"{label}: {name} differs"


if __name__ == "__main__":
    main()
