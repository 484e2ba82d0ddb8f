"""The Hopper backward, on a Hopper GPU, in both its forms: dQ summed by TMA as tiles come, and bitwise repeatable."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from benchmarks.cases import cases
from fm_longctx import FlashMask
from fm_longctx.kernels import portable
from fm_longctx.mask import builders
from tests.attention.oracle import (
    DEVICE,
    Result,
    assert_within_budget,
    dense_attention,
    gradients,
    random_inputs,
    visit_every_tile,
)

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs compute capability 9.0", allow_module_level=True)

from fm_longctx.kernels.hopper import launch

FORMS = pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])


def rowsum(out: Tensor, dout: Tensor) -> Tensor:
    return (out.float() * dout.float()).sum(-1).transpose(1, 2)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    mask: FlashMask,
    scale: float,
    *,
    deterministic: bool,
    grad_dtype: torch.dtype | None = None,
) -> Result:
    out, lse = launch.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)
    delta = rowsum(out, dout) if dlse is None else rowsum(out, dout) - dlse
    options = {"scale": scale, "grad_dtype": grad_dtype or q.dtype, "deterministic": deterministic}
    return Result(out, lse, *launch.backward(dout, q, k, v, lse, delta, mask, **options))


def check(q: Tensor, k: Tensor, v: Tensor, mask: FlashMask, visible: Tensor, *, deterministic: bool) -> Result:
    """Compare with the float64 oracle; visible as `dense_attention` takes it."""
    scale = 1 / math.sqrt(q.shape[-1])
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(q.shape, generator=generator).to(q)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=generator).to(q)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, visible, scale)

    exact = gradients(dense, q.double(), k.double(), v.double(), dout, dlse)
    low = gradients(dense, q, k, v, dout, dlse)
    result = run(q, k, v, dout, dlse, mask, scale, deterministic=deterministic)
    assert_within_budget(result, exact, low)
    return result


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", [case.name for case in cases(64)])
def test_every_mask_case(name, d, dtype, deterministic):
    n = 777
    case = next(case for case in cases(n, seed=3) if case.name == name)
    index = torch.arange(n, device=DEVICE)
    visible = case.visible(index[:, None], index[None, :])[None, None]
    q, k, v = random_inputs(rows=n, heads=4, kv_heads=2, d=d, dtype=dtype)
    check(q, k, v, case.mask.to(DEVICE), visible, deterministic=deterministic)


@FORMS
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "rows, columns",
    [(1, 1), (1, 1000), (1000, 1), (63, 63), (64, 64), (65, 127), (127, 129), (128, 128), (40, 300), (300, 40)],
)
def test_lengths(rows, columns, causal, d, deterministic):
    r, j = torch.arange(rows, device=DEVICE)[:, None], torch.arange(columns, device=DEVICE)[None, :]
    visible = ((j - (columns - rows) <= r) if causal else (r == r)) & ~((r >= 20) & (r < 35) & (j % 3 == 0))
    starts = torch.where(torch.arange(columns) % 3 == 0, 20, rows)[None, None, None].int()
    ends = torch.where(torch.arange(columns) % 3 == 0, 35, rows)[None, None, None].int()
    mask = FlashMask(starts, ends, causal=causal, num_rows=rows).to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=rows, columns=columns, heads=2, d=d, dtype=torch.bfloat16)
    check(q, k, v, mask, visible[None, None], deterministic=deterministic)


@FORMS
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("mask_heads", [1, 2, 6])
def test_masks_by_sample_and_head(mask_heads, d, deterministic):
    n = 400
    visible = torch.ones(2, mask_heads, n, n, dtype=torch.bool)
    for b in range(2):
        for h in range(mask_heads):
            visible[b, h, 100 * b + 30 * h : 200 + 30 * h, 50 * h :] = False
    mask = FlashMask.from_dense(visible, max_intervals=3).to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=n, heads=6, kv_heads=2, d=d, dtype=torch.bfloat16)
    check(q, k, v, mask, visible.to(DEVICE), deterministic=deterministic)


@FORMS
@pytest.mark.parametrize("d", [64, 128])
def test_samples_of_a_batch_are_what_they_are_alone(d, deterministic):
    """Of the batch every CTA takes several items, of a sample none more than one."""
    n, kv_heads = 700, 8
    masks = [builders.causal_document([100 * b + 50, 650 - 100 * b]).to(DEVICE) for b in range(6)]
    q, k, v = random_inputs(batch=6, rows=n, heads=16, kv_heads=kv_heads, d=d, dtype=torch.bfloat16)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    assert kv_heads * -(-n // 128) <= processors < 6 * kv_heads * (n // 128)
    together = run(q, k, v, dout, None, FlashMask.stack(masks), 0.1, deterministic=deterministic)
    for b, mask in enumerate(masks):
        sample = slice(b, b + 1)
        alone = run(q[sample], k[sample], v[sample], dout[sample], None, mask, 0.1, deterministic=deterministic)
        assert torch.equal(together.dk[sample], alone.dk) and torch.equal(together.dv[sample], alone.dv)
        if deterministic:
            assert torch.equal(together.dq[sample], alone.dq)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("processors, batch", [(8, 2), (4, 1), (16, 3)])
def test_heads_and_lists_in_several_rounds(processors, batch, d, monkeypatch):
    """As of long sequences on many processors: lists walked from either end, heads two at a time, a last one alone."""
    n = 1000
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[500:, :470] = False
    visible[900:, 600:650] = False
    mask = FlashMask.from_dense(visible[None, None], max_intervals=3).to(DEVICE)
    monkeypatch.setattr(launch, "_processors", lambda _: processors)
    abreast, last, turns = launch.rounds(-(-n // 128), 3 * batch, 1, processors)
    assert turns and (abreast, last) == ((2, 1) if processors == 16 else (1, 1))
    q, k, v = random_inputs(batch=batch, rows=n, heads=6, kv_heads=3, d=d, dtype=torch.bfloat16)
    check(q, k, v, mask, visible[None, None].to(DEVICE), deterministic=False)


def test_grouped_heads_with_masks_of_their_own_take_the_repeatable_form():
    n = 300
    visible = torch.ones(1, 4, n, n, dtype=torch.bool)
    for h in range(4):
        visible[:, h, 50 * h : 50 * h + 60, 20:] = False
    q, k, v = random_inputs(rows=n, heads=4, kv_heads=2, d=64, dtype=torch.bfloat16)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    mask = FlashMask.from_dense(visible).to(DEVICE)
    either, repeatable = (run(q, k, v, dout, None, mask, 0.1, deterministic=x) for x in (False, True))
    assert torch.equal(either.dq, repeatable.dq) and torch.equal(either.dk, repeatable.dk)


@FORMS
@pytest.mark.parametrize("d", [64, 128])
def test_rows_that_see_nothing_and_columns_that_nobody_sees(d, deterministic):
    n = 700
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[100:400] = False
    visible[:, 128:400] = False
    mask = FlashMask.from_dense(visible).to(DEVICE)
    q, k, v = random_inputs(rows=n, d=d, dtype=torch.bfloat16)
    result = check(q, k, v, mask, visible[None, None].to(DEVICE), deterministic=deterministic)
    assert result.dq[:, 100:400].eq(0).all()
    assert result.dk[:, 128:400].eq(0).all() and result.dv[:, 128:400].eq(0).all()


@FORMS
def test_strided_inputs_are_read_as_they_are(deterministic):
    n, d = 300, 64
    mask = builders.causal(n).to(DEVICE)
    visible = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()[None, None]
    packed = torch.randn(1, n, 3, 2, d, device=DEVICE).half()
    by_head = torch.randn(1, 2, n, d, device=DEVICE).half().transpose(1, 2)
    by_dim = torch.randn(1, n, d, 2, device=DEVICE).half().transpose(2, 3)
    for q, k, v in (packed.unbind(2), (by_head, by_dim, packed[:, :, 0])):
        check(q, k, v, mask, visible, deterministic=deterministic)
    # Gradients of the output come as strange: one number for all, and transposed.
    q, k, v = packed.unbind(2)
    for dout in (torch.ones((), device=DEVICE).half().expand(q.shape), by_head):
        options = {"deterministic": deterministic}
        strided = run(q, k, v, dout, None, mask, 0.1, **options)
        plain = run(q, k, v, dout.contiguous(), None, mask, 0.1, **options)
        assert torch.equal(strided.dk, plain.dk) and torch.equal(strided.dv, plain.dv)
        torch.testing.assert_close(strided.dq, plain.dq, rtol=2e-3, atol=1e-4)


@FORMS
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("n", [300, 320])  # of whole tiles: dQ stays where it was summed
def test_gradients_in_float32(n, d, deterministic):
    mask = builders.causal_document([130, n - 130]).to(DEVICE)
    q, k, v = random_inputs(rows=n, heads=4, kv_heads=2, d=d, dtype=torch.bfloat16)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    options = {"deterministic": deterministic, "grad_dtype": torch.float32}
    result = run(q, k, v, dout, None, mask, 0.1, **options)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, mask.to_dense(), 0.1)

    exact = gradients(dense, q.double(), k.double(), v.double(), dout, None)
    for name in ("dq", "dk", "dv"):
        got, want = getattr(result, name), getattr(exact, name)
        assert got.dtype == torch.float32 and got.shape == want.shape
        # Only P, dS and (in delta) the output were rounded, and the errors average out.
        assert (got - want).norm() <= 4e-3 * want.norm(), name


def _long() -> tuple[FlashMask, tuple[Tensor, Tensor, Tensor], Tensor]:
    mask = builders.causal_document([900, 1100]).to(DEVICE)
    inputs = random_inputs(rows=2000, heads=8, kv_heads=2, d=128, dtype=torch.bfloat16)
    return mask, inputs, torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])


def test_repeats_bit_for_bit():
    mask, (q, k, v), dout = _long()
    first = run(q, k, v, dout, None, mask, 0.1, deterministic=True)
    for _ in range(20):
        again = run(q, k, v, dout, None, mask, 0.1, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_only_the_sum_of_dq_may_vary():
    mask, (q, k, v), dout = _long()
    first = run(q, k, v, dout, None, mask, 0.1, deterministic=False)
    for _ in range(20):
        again = run(q, k, v, dout, None, mask, 0.1, deterministic=False)
        assert torch.equal(first.dk, again.dk) and torch.equal(first.dv, again.dv)
        torch.testing.assert_close(first.dq, again.dq, rtol=1e-2, atol=1e-3 * first.dq.abs().max().item())


@pytest.mark.parametrize("d", [64, 128])
def test_skipping_changes_no_bit(d):
    n = 1000
    mask = builders.causal_document([300, 700]).to(DEVICE) & builders.sliding_window(n, 200).to(DEVICE)
    q, k, v = random_inputs(rows=n, d=d, dtype=torch.bfloat16)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    skipping = run(q, k, v, dout, None, mask, 0.1, deterministic=True)
    assert len(launch.schedules_needed(q, v, mask, backward=True, deterministic=True)) == 2
    visit_every_tile(mask)
    forced = run(q, k, v, dout, None, mask, 0.1, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(skipping, forced, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_races(seed):
    """Random sizes and masks, each some times over: what has one writer repeats, and all agree with the portable."""
    generator = random.Random(seed)
    rows, columns = generator.randint(1, 1500), generator.randint(1, 1500)
    kv_heads, share, d = generator.choice([1, 2, 3]), generator.choice([1, 2, 4]), generator.choice([64, 128])
    intervals, causal = generator.randint(0, 3), generator.random() < 0.5
    torch.manual_seed(seed)
    bounds = torch.randint(0, rows + 1, (2, 1, 1, intervals, columns), dtype=torch.int32)
    mask = FlashMask(bounds.amin(0), bounds.amax(0), causal=causal, num_rows=rows).to(DEVICE)
    q, k, v = random_inputs(
        batch=2, rows=rows, columns=columns, heads=kv_heads * share, kv_heads=kv_heads, d=d, dtype=torch.bfloat16
    )
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).to(q)
    first = run(q, k, v, dout, None, mask, 0.1, deterministic=False)
    delta = rowsum(first.out, dout)
    expected = portable.backward(dout, q, k, v, first.lse, delta, mask, scale=0.1, grad_dtype=torch.float32)
    for deterministic in (False, True, False, True, False):
        again = run(q, k, v, dout, None, mask, 0.1, deterministic=deterministic)
        for name, want in zip(("dq", "dk", "dv"), expected, strict=True):
            got = getattr(again, name).float()
            worst = (got - want).abs().max().item()
            assert worst <= 0.02 * want.abs().max().item() + 1e-6, name
        if not deterministic:
            assert torch.equal(first.dk, again.dk) and torch.equal(first.dv, again.dv)
