"""What only a GPU can show: addresses beyond 2^31, CUDA graphs, repeatability under load, inductor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fm_longctx import FlashMask, flashmask_attention
from fm_longctx.mask import builders
from tests.attention.oracle import (
    DEVICE,
    Result,
    assert_within_budget,
    check,
    dense_attention,
    gradients,
    random_inputs,
)
from tests.attention.variants import gpu_backends, interval_variants, rule_variants

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BATCH, HEADS, KV_HEADS = 2, 6, 2
SHAPE = {"batch": BATCH, "heads": HEADS, "kv_heads": KV_HEADS, "dtype": torch.bfloat16}
INTERVALS = [v.name for v in interval_variants(5, 5, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS)]
RULES = [v.name for v in rule_variants(64)]


@pytest.fixture(params=gpu_backends())
def backend(request):
    return request.param


def attend_under(mask: FlashMask, backend: str, **options):
    return lambda q, k, v: flashmask_attention(q, k, v, mask, return_lse=True, backend=backend, **options)


def three_intervals(rows: int, columns: int) -> FlashMask:
    """Up to 3 random intervals by sample and query head: as many as every backend takes."""
    generator = torch.Generator().manual_seed(rows)
    starts = torch.randint(0, rows, (BATCH, HEADS, 3, columns), generator=generator, dtype=torch.int32)
    length = torch.randint(0, rows // 6, starts.shape, generator=generator, dtype=torch.int32)
    return FlashMask(starts, starts + length, causal=False, num_rows=rows)


@pytest.mark.parametrize("name", RULES + INTERVALS)
@pytest.mark.parametrize("rows, columns", [(197, 197), (333, 1001), (1001, 333)])
def test_every_mask_and_a_loss_on_lse_alone(name, rows, columns, backend):
    every = list(interval_variants(rows, columns, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS))
    if name in RULES:
        if rows != columns:
            pytest.skip("the named masks are square")
        every = list(rule_variants(rows))
    variant = next(v for v in every if v.name == name)
    if backend == "hopper" and variant.mask.num_intervals > 3:
        pytest.skip("hopper takes up to 3 intervals a column")
    q, k, v = random_inputs(rows=rows, columns=columns, d=64, **SHAPE)
    visible = variant.visible.to(DEVICE)
    for with_out in (True, False):
        attend = attend_under(variant.mask.to(DEVICE), backend)
        check(attend, q, k, v, visible, 1 / math.sqrt(64), with_out=with_out)


@pytest.mark.parametrize("name", INTERVALS)
def test_deterministic_mode_repeats_bit_for_bit(name, backend):
    n = 1999
    variants = interval_variants(n // 4, n // 4, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS)
    small = next(v.mask for v in variants if v.name == name)
    # The same intervals, over four times the rows and columns.
    starts, ends = (x.repeat_interleave(4, dim=-1) * 4 for x in (small.starts, small.ends))
    mask = FlashMask(starts, ends, causal=small.causal, num_rows=n).to(DEVICE)
    if backend == "hopper" and mask.num_intervals > 3:
        pytest.skip("hopper takes up to 3 intervals a column")
    q, k, v = random_inputs(rows=n, columns=mask.num_columns, d=128, **SHAPE)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(q.shape, generator=generator).to(q)
    dlse = torch.randn(BATCH, HEADS, n, generator=generator).to(q)
    attend = attend_under(mask, backend, deterministic=True)
    first = gradients(attend, q, k, v, dout, dlse)
    assert all(bool(x.isfinite().all()) for x in (first.out, first.dq, first.dk, first.dv))
    for _ in range(20):
        again = gradients(attend, q, k, v, dout, dlse)
        for part, a, b in zip(Result._fields, first, again, strict=True):
            assert torch.equal(a, b), part


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_never_waits_for_the_device(deterministic, backend):
    """Nor does building the schedules of a mask that is new."""
    q, k, v = random_inputs(rows=777, columns=1001, d=128, **SHAPE)
    dout = torch.randn_like(q)
    attend = attend_under(three_intervals(777, 1001).to(DEVICE), backend, deterministic=deterministic)
    gradients(attend, q, k, v, dout)  # compiles
    attend = attend_under(three_intervals(777, 1001).to(DEVICE), backend, deterministic=deterministic)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = attend(*leaves)
        torch.autograd.grad(out, leaves, dout)
        with pytest.raises(RuntimeError, match="synchronizing"):
            out.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_graph_of_forward_and_backward(deterministic, backend):
    rows, columns = 777, 1001
    mask = three_intervals(rows, columns).to(DEVICE)

    def draw(seed: int) -> list[Tensor]:
        q, k, v = random_inputs(rows=rows, columns=columns, d=128, seed=seed, **SHAPE)
        generator = torch.Generator().manual_seed(seed + 100)
        dout = torch.randn(q.shape, generator=generator).to(q)
        return [q, k, v, dout, torch.randn(BATCH, HEADS, rows, generator=generator).to(DEVICE)]

    inputs = draw(0)
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def step() -> list[Tensor]:
        result = attend_under(mask, backend, deterministic=deterministic)(*leaves)
        return [*result, *torch.autograd.grad(result, leaves, inputs[3:])]

    # As PyTorch asks: warm up on a side stream, which also builds the schedules and compiles the kernels.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    earlier = None
    for seed in (1, 2):
        with torch.no_grad():
            for x, new in zip(inputs, draw(seed), strict=True):
                x.copy_(new)
        graph.replay()
        replayed = [x.detach().clone() for x in captured]
        exact = gradients(
            lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 1 / math.sqrt(128)),
            *(x.double() for x in inputs),
        )
        low = gradients(
            lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 1 / math.sqrt(128)),
            *(x.detach() for x in inputs),
        )
        assert_within_budget(Result(*replayed), exact, low)
        if deterministic:
            assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        assert earlier is None or not any(torch.equal(a, b) for a, b in zip(replayed, earlier, strict=True))
        earlier = replayed


def test_inductor_compiles_it_as_one_graph(backend):
    rows, columns = 300, 517
    mask = three_intervals(rows, columns).to(DEVICE)
    inputs = random_inputs(rows=rows, columns=columns, d=64, **SHAPE)
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2)).to(inputs[0])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # Powers of two: exact in any order of rounding, so that fused and unfused arithmetic agree to the bit.
        out, lse = flashmask_attention(q * 2, k, v / 2, mask, return_lse=True, backend=backend, deterministic=True)
        return out * 4, lse / 2

    compiled = torch.compile(layer, fullgraph=True)
    dlse = torch.ones(BATCH, HEADS, rows, device=DEVICE)
    expected, got = (gradients(fn, *inputs, dout, dlse) for fn in (layer, compiled))
    for part, a, b in zip(Result._fields, expected, got, strict=True):
        assert torch.equal(a, b), part


def test_activation_checkpointing_gives_the_same_gradients(backend):
    rows, columns = 300, 517
    mask = three_intervals(rows, columns).to(DEVICE)
    q, k, v = random_inputs(rows=rows, columns=columns, d=64, **SHAPE)
    attend = attend_under(mask, backend, deterministic=True)
    dlse = torch.ones(BATCH, HEADS, rows, device=DEVICE)
    kept = gradients(attend, q, k, v, torch.ones_like(q), dlse)
    again = gradients(
        lambda q, k, v: checkpoint(attend, q, k, v, use_reentrant=False), q, k, v, torch.ones_like(q), dlse
    )
    for part, a, b in zip(Result._fields, kept, again, strict=True):
        assert torch.equal(a, b), part


def check_windows(q: Tensor, k: Tensor, v: Tensor, window: int, columns: list[int], backend: str) -> None:
    """Under a sliding window, compare with float64 every row that sees one of these columns, and the columns' own
    gradients. Only those rows and columns are ever upcast, so q, k and v may be of any size."""
    n, scale = q.shape[1], 1 / math.sqrt(q.shape[3])
    mask = builders.sliding_window(n, window).to(q.device)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attend_under(mask, backend)(q, k, v)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    for column in columns:
        # The rows that see the column, and all columns that those rows see.
        rows, seen = slice(column, min(n, column + window)), slice(max(0, column - window + 1), min(n, column + window))
        r, c = (torch.arange(s.start, s.stop, device=q.device) for s in (rows, seen))
        visible = ((c <= r[:, None]) & (r[:, None] - c < window))[None, None]
        own = slice(column - seen.start, column - seen.start + 1)

        def dense(dtype: torch.dtype, rows=rows, seen=seen, visible=visible, own=own) -> Result:
            full = gradients(
                lambda q, k, v: dense_attention(q, k, v, visible, scale),
                *(x[:, s].to(dtype) for x, s in ((q, rows), (k, seen), (v, seen))),
                dout[:, rows],
                dlse[:, :, rows],
            )
            return full._replace(dk=full.dk[:, own], dv=full.dv[:, own])

        at = slice(column, column + 1)
        got = Result(out[:, rows].detach(), lse[:, :, rows].detach(), dq[:, rows], dk[:, at], dv[:, at])
        assert_within_budget(got, dense(torch.float64), dense(q.dtype))


def test_more_than_two_to_the_31_elements(backend):
    """q, out and their gradients have over 2^31 elements each; k and v are read across as many, being views."""
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("takes up to 60 GB of GPU memory")
    n, heads, kv_heads, d = 131_500, 128, 2, 128
    # What a fused projection gives: q, k and v of a token lie next to one another.
    packed = torch.randn(1, n, heads + 2 * kv_heads, d, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=2)
    assert q.numel() > 2**31 and k.stride(1) * n > 2**31
    first_beyond = 2**31 // packed.stride(1)
    torch.cuda.reset_peak_memory_stats()
    check_windows(q, k, v, 100, [0, n // 2, first_beyond - 50, first_beyond, 2**31 // (heads * d), n - 30], backend)
    assert torch.cuda.max_memory_allocated() < 60e9
