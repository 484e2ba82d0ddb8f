"""The op against dense float64 attention, both backends: outputs, LSE and all gradients."""

import math

import pytest
import torch

from benchmarks.cases import cases
from fm_longctx import FlashMask, flashmask_attention
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, check, gradients, random_inputs, visit_every_tile

CASES = [case.name for case in cases(64)]


def attend_under(mask, backend, scale=None):
    return lambda q, k, v: flashmask_attention(q, k, v, mask, scale=scale, return_lse=True, backend=backend)


def visible_by_rule(case, n):
    index = torch.arange(n, device=DEVICE)
    return case.visible(index[:, None], index[None, :])[None, None]


@pytest.mark.parametrize("name", CASES)
def test_every_mask_case(name, backend):
    n = 111
    case = next(case for case in cases(n, seed=3) if case.name == name)
    q, k, v = random_inputs(rows=n, heads=2, kv_heads=1)
    mask = case.mask.to(DEVICE)
    check(attend_under(mask, backend), q, k, v, visible_by_rule(case, n), 1 / math.sqrt(32))


@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 65, 257])
def test_odd_lengths_and_tile_edges(n, backend):
    first = max(1, n // 3)
    mask = builders.causal_document([first, n - first]).to(DEVICE)
    index = torch.arange(n, device=DEVICE)
    document = (index >= first).long()
    visible = (index[:, None] >= index) & (document[:, None] == document)
    q, k, v = random_inputs(rows=n, heads=1)
    check(attend_under(mask, backend), q, k, v, visible[None, None], 1 / math.sqrt(32))


@pytest.mark.parametrize(
    "heads, kv_heads, mask_heads",
    [(4, 2, "one"), (4, 2, "kv"), (4, 2, "all"), (3, 1, "one"), (3, 1, "all"), (6, 2, "kv"), (6, 2, "all")],
)
def test_grouped_heads_and_masks_by_head(heads, kv_heads, mask_heads, backend):
    n, h_mask = 50, {"one": 1, "kv": kv_heads, "all": heads}[mask_heads]
    # Runs of ten rows: at most three intervals a column, for interpreted kernels take as long as there are intervals.
    visible = torch.rand(2, h_mask, n // 10, n, generator=torch.Generator().manual_seed(1)) < 0.5
    visible = visible.repeat_interleave(10, dim=2)
    visible[..., :40, 32:] = False  # so that tiles are skipped, by other heads than the last ones
    visible[:, 0, :, :32] = False
    mask = FlashMask.from_dense(visible, max_intervals=n).to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=n, heads=heads, kv_heads=kv_heads, d=16)
    check(attend_under(mask, backend), q, k, v, visible.to(DEVICE), 1 / math.sqrt(16))


@pytest.mark.parametrize("rows, columns", [(40, 100), (100, 40), (1, 97), (97, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_and_columns_differ(rows, columns, causal, backend):
    r, j = torch.arange(rows, device=DEVICE)[:, None], torch.arange(columns, device=DEVICE)[None, :]
    visible = ((j - (columns - rows) <= r) if causal else (r == r)) & ~((r >= 20) & (r < 35) & (j % 3 == 0))
    starts = torch.where(torch.arange(columns) % 3 == 0, 20, rows)[None, None, None].int()
    ends = torch.where(torch.arange(columns) % 3 == 0, 35, rows)[None, None, None].int()
    mask = FlashMask(starts, ends, causal=causal, num_rows=rows).to(DEVICE)
    q, k, v = random_inputs(rows=rows, columns=columns, heads=2)
    check(attend_under(mask, backend), q, k, v, visible[None, None], 1 / math.sqrt(32))


def test_rows_that_see_nothing(backend):
    n = 80
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[20:70] = False
    mask = FlashMask.from_dense(visible).to(DEVICE)
    q, k, v = random_inputs(rows=n)
    result = check(attend_under(mask, backend), q, k, v, visible[None, None].to(DEVICE), 1 / math.sqrt(32))
    assert result.out[:, 20:70].eq(0).all() and result.dq[:, 20:70].eq(0).all()
    assert result.lse[:, :, 20:70].eq(float("-inf")).all()


@pytest.mark.parametrize("columns", [0, 50])
def test_nothing_visible_at_all(columns, backend):
    starts = torch.zeros(1, 1, 1, columns, dtype=torch.int32)
    mask = FlashMask(starts, starts + 40, causal=False, num_rows=40).to(DEVICE)
    q, k, v = random_inputs(rows=40, columns=columns)
    result = gradients(attend_under(mask, backend), q, k, v, torch.ones_like(q), torch.ones(1, 2, 40, device=DEVICE))
    assert result.out.eq(0).all() and result.lse.eq(float("-inf")).all()
    assert result.dq.eq(0).all() and result.dk.eq(0).all() and result.dv.eq(0).all()


@pytest.mark.parametrize(
    "d, d_v", [(32, 32), (64, 64), (80, 80), (96, 96), (96, 64), (128, 128), (192, 192), (192, 128), (256, 256)]
)
def test_head_dimensions(d, d_v, backend):
    n = 40
    mask = builders.causal_document([15, 25]).to(DEVICE)
    visible = torch.block_diag(torch.ones(15, 15), torch.ones(25, 25)).tril().bool()
    q, k, v = random_inputs(rows=n, heads=1, d=d, d_v=d_v)
    check(attend_under(mask, backend), q, k, v, visible[None, None].to(DEVICE), 1 / math.sqrt(d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype, backend):
    n = 100
    mask = builders.sliding_window(n, 37).to(DEVICE)
    r, j = torch.arange(n, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)[None, :]
    q, k, v = random_inputs(rows=n, dtype=dtype)
    result = check(attend_under(mask, backend, 0.3), q, k, v, ((j <= r) & (r - j < 37))[None, None], 0.3)
    assert result.out.dtype == result.dq.dtype == result.dk.dtype == result.dv.dtype == dtype
    assert result.lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_softcap(dtype, backend):
    """Gemma's: softcap * tanh(score / softcap), masked afterwards. Scores reach well into the bend."""
    n, scale, softcap = 75, 0.5, 2.0
    mask = builders.causal_document([30, 45]).to(DEVICE)
    visible = torch.block_diag(torch.ones(30, 30), torch.ones(45, 45)).tril().bool()[None, None].to(DEVICE)
    q, k, v = random_inputs(rows=n, heads=4, kv_heads=2, dtype=dtype)

    def attend(q, k, v):
        return flashmask_attention(q, k, v, mask, scale=scale, softcap=softcap, return_lse=True, backend=backend)

    check(attend, q, k, v, visible, scale, softcap=softcap)
    uncapped = flashmask_attention(q, k, v, mask, scale=scale, backend=backend)
    assert (attend(q, k, v)[0] - uncapped).abs().max() > 0.05


def test_reference_is_exact_in_float64():
    n = 50
    mask = builders.causal(n).to(DEVICE)
    q, k, v = (x.double() for x in random_inputs(rows=n))
    visible = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()[None, None]
    result = check(attend_under(mask, "reference"), q, k, v, visible, 1 / math.sqrt(32))
    assert result.out.dtype == torch.float64


@pytest.mark.parametrize("intervals", [0, 1, 2, 3, 4, 5, 7])
def test_any_number_of_intervals(intervals, backend):
    n = 90
    r, j = torch.arange(n, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)[None, :]
    # Interval i masks rows [12 i + j % 5, 12 i + j % 5 + 4).
    visible = torch.ones(n, n, dtype=torch.bool, device=DEVICE)
    for i in range(intervals):
        first = 12 * i + j % 5
        visible &= ~((r >= first) & (r < first + 4))
    starts = torch.stack([12 * i + torch.arange(n) % 5 for i in range(intervals)]) if intervals else torch.empty(0, n)
    starts = starts.int()[None, None]
    mask = FlashMask(starts, starts + 4, causal=False, num_rows=n).to(DEVICE)
    assert mask.num_intervals == intervals
    q, k, v = random_inputs(rows=n, heads=1)
    check(attend_under(mask, backend), q, k, v, visible[None, None], 1 / math.sqrt(32))


def test_strided_inputs_are_read_as_they_are(backend):
    n, d = 45, 32
    mask = builders.causal(n).to(DEVICE)
    visible = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()[None, None]
    packed = torch.randn(1, n, 3, 2, d, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    by_head = torch.randn(1, 2, n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE).transpose(1, 2)
    by_dim = torch.randn(1, n, d, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE).transpose(2, 3)
    for q, k, v in (packed.unbind(2), (by_head, by_dim, packed[:, :, 0]), (by_dim, by_head, by_dim)):
        check(attend_under(mask, backend), q, k, v, visible, 1 / math.sqrt(d))


def test_skipping_changes_no_bit(backend):
    """With every tile visited as a partial one, forward and backward give the very same bits."""
    n = 110
    starts = torch.tensor([40, 80])[torch.arange(n) % 2].int()[None, None, None]
    mask = FlashMask(starts, starts + 20, causal=True).to(DEVICE) & builders.causal_document([50, 60]).to(DEVICE)
    q, k, v = random_inputs(rows=n)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(q)
    skipping = gradients(attend_under(mask, backend), q, k, v, dout)
    visit_every_tile(mask)
    forced = gradients(attend_under(mask, backend), q, k, v, dout)
    for name, a, b in zip(skipping._fields, skipping, forced, strict=True):
        assert torch.equal(a, b), name


def test_gradients_repeat_bit_for_bit(backend):
    n = 70
    mask = builders.causal_document([30, 40]).to(DEVICE)
    q, k, v = random_inputs(rows=n, heads=4, kv_heads=2, dtype=torch.float16)
    first = gradients(attend_under(mask, backend), q, k, v, torch.ones_like(q))
    second = gradients(attend_under(mask, backend), q, k, v, torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
