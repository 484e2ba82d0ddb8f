"""Small suites for compute-sanitizer: each kernel at each D, number of intervals and kind of edge once, and checked.

    python -m tests.attention.memcheck --compile 15
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.attention.memcheck
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.attention.memcheck --broken      # must fail
    compute-sanitizer --tool racecheck python -m tests.attention.memcheck --suite race > races.txt
    python -m tests.attention.memcheck --races races.txt

The first command compiles in 15 processes what the others then load from Triton's cache: under the sanitizer
compiling is slow. What is expected is computed on the CPU, so that next to no kernels but our own are checked; the
sanitizer's `--kernel-name-exclude kns=at6native` leaves out those of PyTorch. `--seconds` stops in good order, and says
what it left out.

memcheck sees the addresses of plain loads and stores. A TMA box that ends beyond a tensor is clipped, which is no
fault. racecheck sees what threads read and write in shared memory: the merge and the statistics, and in the Hopper
kernels P, dS and what leaves by way of shared memory. It does not see what TMA writes there, for no thread does, nor
what wgmma reads: that consumers wait for the mbarrier of a tile, and the producer for theirs, is left to the tests that
compare results bit by bit (tests/attention/test_gpu.py).

Of every kernel with warp specialisation racecheck reports hazards (on an H100, version 2025.3.1) by code that Triton
writes, at the lines where it hands its warps their work: the kernel's `def` and `warp_specialize`. And it reports every
word that one warp hands to others by an mbarrier, whose order it does not see: a kernel that does nothing else, and in
the right order, is reported as well (tests/attention/handover.py). That order is left to the delays of
tests/attention/racecheck.py. `--races` prints what is at any other line, and fails if there is some.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_longctx import flashmask_attention
from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward, load_backend
from fm_longctx.kernels.merge import add_rows, merge
from tests.attention.oracle import DEVICE, check, random_inputs
from tests.attention.variants import Variant, gpu_backends, interval_variants

BATCH, HEADS, KV_HEADS = 2, 4, 2
# None a multiple of a tile, then all of them.
SIZES = ((197, 197), (100, 197), (197, 100), (256, 256))
HOPPER = Path(__file__).parents[2] / "kernels" / "hopper"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mask and shape, forward and backward."""

    backend: str
    d: int
    d_v: int | None = None
    dtype: torch.dtype = BRAIN
    intervals: int = 1
    causal: bool = True
    size: tuple[int, int] = SIZES[0]
    kv_heads: int = KV_HEADS
    softcap: float | None = None
    deterministic: bool = False
    partial: bool = False
    """As context parallelism calls it: float32 results of a part."""
    strided: bool = False

    def variant(self) -> Variant:
        """Random intervals, by sample and head as `interval_variants` has it for their number."""
        every = interval_variants(*self.size, batch=BATCH, heads=HEADS, kv_heads=self.kv_heads)
        return list(every)[2 * self.intervals + self.causal]


def triton_cases() -> list[Case]:
    found = [Case(backend="triton", d=64, intervals=k, causal=k % 2 == 1, size=SIZES[k % len(SIZES)]) for k in range(6)]
    found += [Case(backend="triton", d=64, intervals=k, causal=k % 2 == 0) for k in range(3)]
    found += [Case(backend="triton", d=128), Case(backend="triton", d=128, intervals=2, causal=False, size=SIZES[1])]
    found += [Case(backend="triton", d=80, dtype=HALF, intervals=2, size=SIZES[2], strided=True)]
    found += [Case(backend="triton", d=32, dtype=FULL), Case(backend="triton", d=256, intervals=3, causal=False)]
    found += [Case(backend="triton", d=192, d_v=128, causal=False), Case(backend="triton", d=64, softcap=5.0)]
    return [*found, Case(backend="triton", d=64, partial=True)]


def hopper_cases() -> list[Case]:
    """`kv_heads=HEADS`: where heads are not shared dQ is summed by the kernel of dK and dV."""
    found = [
        Case(backend="hopper", d=d, intervals=k, causal=k == 1, size=SIZES[(k + i) % len(SIZES)], kv_heads=HEADS)
        for i, d in enumerate((64, 128))
        for k in range(4)
    ]
    found += [Case(backend="hopper", d=128, intervals=0, size=SIZES[1]), Case(backend="hopper", d=64, intervals=3)]
    found += [Case(backend="hopper", d=128, kv_heads=HEADS, deterministic=True, size=SIZES[2])]
    found += [Case(backend="hopper", d=256), Case(backend="hopper", d=64, dtype=HALF, strided=True)]
    return [*found, Case(backend="hopper", d=128, kv_heads=HEADS, partial=True)]


def race_cases() -> list[Case]:
    """Of the Hopper kernels each form once: dQ summed and by itself, 16-bit results and float32."""
    return [
        Case(backend="hopper", d=64, kv_heads=HEADS),
        Case(backend="hopper", d=64, intervals=3, causal=False),
        Case(backend="hopper", d=128, kv_heads=HEADS),
        Case(backend="hopper", d=128, intervals=3, causal=False),
        Case(backend="hopper", d=128, kv_heads=HEADS, partial=True),
    ]


def suite(name: str) -> list[Case]:
    """The cases of `all` or `race` whose backend runs on this GPU."""
    cases = race_cases() if name == "race" else [*hopper_cases(), *triton_cases()]
    return [case for case in cases if case.backend in gpu_backends()]


def run(case: Case, variant: Variant) -> None:
    """Check one case, forward and backward.

    Raises:
        AssertionError: a result is wrong.
    """
    mask, visible = variant.mask.to(DEVICE), variant.visible.cpu()
    shape = {"batch": BATCH, "heads": HEADS, "kv_heads": case.kv_heads, "d": case.d, "d_v": case.d_v}
    rows, columns = case.size
    q, k, v = (x.cpu() for x in random_inputs(rows=rows, columns=columns, dtype=case.dtype, **shape))
    scale = 1 / math.sqrt(case.d)

    def on_device(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2) if case.strided else x.to(DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        on = (on_device(x) for x in (q, k, v))
        if case.partial:
            return _Part.apply(*on, mask, scale, case.backend)
        options = {"softcap": case.softcap, "backend": case.backend, "deterministic": case.deterministic}
        return tuple(x.cpu() for x in flashmask_attention(*on, mask, return_lse=True, **options))

    check(attend, q, k, v, visible, scale, softcap=case.softcap)


class _Part(torch.autograd.Function):
    """The raw passes with float32 results, which go out by plain stores."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, backend):
        out, lse = attention_forward(q, k, v, mask, scale=scale, backend=backend, out_dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.backend = mask, scale, backend
        return out.cpu().to(q.dtype), lse.cpu()

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.to(q)
        delta = attention_delta(out, dout, dlse.to(lse), backend=ctx.backend)
        options = {"scale": ctx.scale, "backend": ctx.backend, "grad_dtype": torch.float32}
        gradients = attention_backward(dout, q, k, v, lse, delta, ctx.mask, **options)
        return *(x.to(q.dtype) for x in gradients), None, None, None


def run_merge() -> None:
    """Both forms of the merge, and the sum of rows, at odd sizes.

    Raises:
        AssertionError: a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    b, n, h, d = 2, 197, 3, 80
    out, part = (torch.randn(b, n, h, d, generator=generator) for _ in range(2))
    lse, part_lse = (torch.randn(b, h, n, generator=generator) for _ in range(2))
    lse[:, 0, ::3], part_lse[:, 1, ::2] = float("-inf"), float("-inf")
    both = torch.stack([lse, part_lse]).transpose(2, 3)[..., None]
    shares = (both - both.logsumexp(0)).exp().nan_to_num(0.0)
    want = shares[0] * out + shares[1] * part
    for dtype in (None, torch.bfloat16):
        o, p, lse_o, lse_p = (x.clone().to(DEVICE) for x in (out, part, lse, part_lse))
        result = o if dtype is None else torch.full(out.shape, math.nan, dtype=dtype).to(DEVICE)
        merge(o, lse_o, p, lse_p, result)
        assert (result.cpu().float() - want).abs().max() <= (1e-5 if dtype is None else 2e-2)
        assert torch.allclose(lse_o.cpu(), torch.logaddexp(lse, part_lse), atol=1e-5)
    total, returned = torch.randn(50, h, d, generator=generator), torch.randn(31, h, d, generator=generator)
    rows = torch.randint(50, (31,), generator=generator).sort().values
    order = torch.randperm(31, generator=generator)
    want = total.index_add(0, rows, returned[order])
    got = total.clone().to(DEVICE)
    add_rows(got, returned.to(DEVICE), rows.to(DEVICE), order.to(DEVICE))
    assert (got.cpu() - want).abs().max() <= 1e-5


@triton.jit
def broken_kernel(p_x, BLOCK: tl.constexpr):
    # Four kilobytes past an allocation of 256 bytes.
    tl.store(p_x + 1024 + tl.arange(0, BLOCK), 1.0)


def run_broken() -> None:
    """A store that is out of bounds: what says nothing of it checks nothing."""
    x = torch.zeros(64, device=DEVICE)
    broken_kernel[(1,)](x, BLOCK=64)
    torch.cuda.synchronize()


# The forward's second line of these is the choice between two calls, where the compiler places the first.
DISPATCH = ("def ", "gl.warp_specialize(", "if CONSUMERS == 2:")
# `write_word` and `read_word`; and the forward's rows that failed, from a consumer to the producer.
HANDED_OVER = ("slot.store(", "return gl.max(slot.load(", "failed_s.index(", "again |= gl.max(failed_s.index(")


def races_elsewhere(report: str, kernels: Path = HOPPER) -> list[str]:
    """The hazards of racecheck's report that are at other lines than Triton's dispatch of warps and words handed over.

    A hazard is left out if all of its lines are of the one kind, or all of the other.
    """
    found = []
    for hazard in re.split(r"^=+ (?=Error: |Warning: )", report, flags=re.MULTILINE)[1:]:
        places = re.findall(r"in (\w+\.py):(\d+)", hazard)
        lines = [_line(kernels / name, int(number)) for name, number in places]
        if not lines or not any(all(line.startswith(kind) for line in lines) for kind in (DISPATCH, HANDED_OVER)):
            found.append(hazard.strip())
    return found


def _line(path: Path, number: int) -> str:
    return path.read_text().splitlines()[number - 1].strip() if path.exists() else ""


def refused(case: Case) -> str | None:
    """Why the backend does not take the case; None if it does."""
    q = torch.empty((BATCH, 1, HEADS, case.d), dtype=case.dtype, device=DEVICE)
    v = torch.empty((BATCH, 1, case.kv_heads, case.d_v or case.d), dtype=case.dtype, device=DEVICE)
    return load_backend(case.backend).refusal(q, v, case.intervals, case.softcap)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["all", "race"], default="all")
    parser.add_argument("--compile", type=int, metavar="PROCESSES", help="run in so many processes, to fill the cache")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no new case begins")
    parser.add_argument("--broken", action="store_true", help="one stray store, which the sanitizer must report")
    parser.add_argument("--races", type=Path, metavar="FILE", help="read a report of racecheck; needs no GPU")
    options = parser.parse_args(arguments)
    if options.races:
        report = options.races.read_text()
        if "RACECHECK SUMMARY" not in report or "checks run and right" not in report:
            raise SystemExit(f"{options.races} is no whole report of racecheck on this suite.")
        found = races_elsewhere(report)
        print(
            "\n".join(found)
            if found
            else "no hazards but those of Triton's dispatch of warps and of words handed over by mbarriers"
        )
        raise SystemExit(1 if found else 0)
    if not torch.cuda.is_available():
        raise SystemExit("memcheck needs an NVIDIA GPU: Triton's interpreter checks no address.")
    # Every tensor in an allocation of its own: within PyTorch's large blocks a stray access would go unseen. PyTorch
    # reads this at its first allocation, and other tests that import this module need its blocks.
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    begin = time.monotonic()
    if options.broken:
        run_broken()
        return
    cases = suite(options.suite)
    if options.compile:
        with multiprocessing.get_context("spawn").Pool(options.compile) as pool:
            for _ in pool.imap_unordered(_run_one, [*cases, None], chunksize=1):
                pass
        print(f"{len(cases)} cases and the merge compiled, run and right in {time.monotonic() - begin:.0f} s")
        return
    for done, line in enumerate(_run_all(cases)):
        print(f"{line}: right, {time.monotonic() - begin:.1f} s", flush=True)
        if time.monotonic() - begin > options.seconds and done < len(cases):
            raise SystemExit(f"stopped at --seconds; {len(cases) - done} of {len(cases) + 1} checks left out")
    print(f"all {len(cases) + 1} checks run and right", flush=True)


def _run_all(cases: list[Case]) -> Iterator[str]:
    run_merge()
    yield "merge, sum of rows"
    for case in cases:
        _run_one(case)
        yield str(case)


def _run_one(case: Case | None) -> None:
    if case is None:
        run_merge()
        return
    reason = refused(case)
    assert reason is None, f"{case}: {case.backend} {reason}"
    run(case, case.variant())


if __name__ == "__main__":
    main()
