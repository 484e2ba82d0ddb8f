"""The Hopper kernels, on a Hopper GPU: what the other backends' tests ask, at the dimensions that these take."""

import math

import pytest
import torch

from benchmarks.cases import cases
from fm_longctx import FlashMask, flashmask_attention
from fm_longctx.attention import passes
from fm_longctx.attention.passes import attention_forward
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, check, dense_attention, random_inputs, visit_every_tile

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def attend_under(mask, scale=None):
    return lambda q, k, v: flashmask_attention(q, k, v, mask, scale=scale, return_lse=True, backend="hopper")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("name", [case.name for case in cases(64)])
def test_every_mask_case(name, d, dtype):
    n = 777
    case = next(case for case in cases(n, seed=3) if case.name == name)
    index = torch.arange(n, device=DEVICE)
    visible = case.visible(index[:, None], index[None, :])[None, None]
    q, k, v = random_inputs(rows=n, heads=4, kv_heads=2, d=d, dtype=dtype)
    check(attend_under(case.mask.to(DEVICE)), q, k, v, visible, 1 / math.sqrt(d))


@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 63), (127, 129), (128, 128), (40, 300), (300, 40), (1, 1000)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(rows, columns, causal):
    r, j = torch.arange(rows, device=DEVICE)[:, None], torch.arange(columns, device=DEVICE)[None, :]
    visible = ((j - (columns - rows) <= r) if causal else (r == r)) & ~((r >= 20) & (r < 35) & (j % 3 == 0))
    starts = torch.where(torch.arange(columns) % 3 == 0, 20, rows)[None, None, None].int()
    ends = torch.where(torch.arange(columns) % 3 == 0, 35, rows)[None, None, None].int()
    mask = FlashMask(starts, ends, causal=causal, num_rows=rows).to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=rows, columns=columns, heads=2, d=128, dtype=torch.bfloat16)
    check(attend_under(mask), q, k, v, visible[None, None], 1 / math.sqrt(128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (64, 65), (191, 193), (192, 192), (193, 40), (40, 300), (577, 333)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_without_intervals(rows, columns, causal, dtype):
    """At D 64, where a block is the 192 rows of three consumers: with one, two or three of them to do."""
    r, j = torch.arange(rows, device=DEVICE)[:, None], torch.arange(columns, device=DEVICE)[None, :]
    visible = (j - (columns - rows) <= r) if causal else (r == r).expand(rows, columns)
    none = torch.zeros((1, 1, 0, columns), dtype=torch.int32)
    mask = FlashMask(none, none, causal=causal, num_rows=rows).to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=rows, columns=columns, heads=6, kv_heads=3, d=64, dtype=dtype)
    check(attend_under(mask), q, k, v, visible[None, None], 1 / 8)


@pytest.mark.parametrize("mask_heads", [1, 2, 6])
def test_masks_by_sample_and_head(mask_heads):
    n = 400
    visible = torch.ones(2, mask_heads, n, n, dtype=torch.bool)
    for b in range(2):
        for h in range(mask_heads):
            visible[b, h, 100 * b + 30 * h : 200 + 30 * h, 50 * h :] = False
    mask = FlashMask.from_dense(visible, max_intervals=3).to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=n, heads=6, kv_heads=2, d=64, dtype=torch.bfloat16)
    check(attend_under(mask), q, k, v, visible.to(DEVICE), 1 / math.sqrt(64))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_samples_of_a_batch_are_what_they_are_alone(d):
    """Of the batch every CTA takes several items, of a sample none more than one."""
    n, heads = 700, 16
    masks = [builders.causal_document([100 * b + 50, 650 - 100 * b]).to(DEVICE) for b in range(5)]
    q, k, v = random_inputs(batch=5, rows=n, heads=heads, kv_heads=4, d=d, dtype=torch.bfloat16)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    assert heads * -(-n // 128) <= processors < 5 * heads * (n // 128)
    out, lse = attend_under(FlashMask.stack(masks))(q, k, v)
    for b, mask in enumerate(masks):
        alone, alone_lse = attend_under(mask)(q[b : b + 1], k[b : b + 1], v[b : b + 1])
        assert torch.equal(out[b : b + 1], alone) and torch.equal(lse[b : b + 1], alone_lse)


def test_rows_that_see_nothing():
    n = 500
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[100:400] = False
    q, k, v = random_inputs(rows=n, d=128, dtype=torch.bfloat16)
    mask = FlashMask.from_dense(visible).to(DEVICE)
    result = check(attend_under(mask), q, k, v, visible[None, None].to(DEVICE), 1 / math.sqrt(128))
    assert result.out[:, 100:400].eq(0).all() and result.lse[:, :, 100:400].eq(float("-inf")).all()


def test_strided_inputs_are_read_as_they_are():
    n, d = 300, 64
    mask = builders.causal(n).to(DEVICE)
    visible = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()[None, None]
    packed = torch.randn(1, n, 3, 2, d, device=DEVICE).half()
    by_head = torch.randn(1, 2, n, d, device=DEVICE).half().transpose(1, 2)
    by_dim = torch.randn(1, n, d, 2, device=DEVICE).half().transpose(2, 3)
    for q, k, v in (packed.unbind(2), (by_head, by_dim, packed[:, :, 0])):
        check(attend_under(mask), q, k, v, visible, 1 / math.sqrt(d))


def test_partial_results_in_float32():
    n, d = 300, 128
    mask = builders.causal_document([130, 170]).to(DEVICE)
    q, k, v = random_inputs(rows=n, d=d, dtype=torch.bfloat16)
    out, lse = attention_forward(q, k, v, mask, scale=0.1, backend="hopper", out_dtype=torch.float32)
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), mask.to_dense(), 0.1)
    assert out.dtype == torch.float32
    # Better than bfloat16 could hold: only P was rounded, and its errors average out.
    assert (out - exact).norm() <= 2e-3 * exact.norm()
    assert (lse - exact_lse).abs().max() <= 1e-4


def test_repeats_bit_for_bit():
    n = 2000
    mask = builders.causal_document([900, 1100]).to(DEVICE)
    q, k, v = random_inputs(rows=n, heads=8, d=128, dtype=torch.bfloat16)
    first = flashmask_attention(q, k, v, mask, backend="hopper")
    assert all(torch.equal(first, flashmask_attention(q, k, v, mask, backend="hopper")) for _ in range(20))


@pytest.mark.parametrize("d, intervals", [(128, True), (64, True), (64, False)])
def test_skipping_changes_no_bit(d, intervals):
    n = 1000
    mask = builders.causal(n).to(DEVICE)
    if intervals:
        mask = builders.causal_document([300, 700]).to(DEVICE) & builders.sliding_window(n, 200).to(DEVICE)
    q, k, v = random_inputs(rows=n, d=d, dtype=torch.bfloat16)
    skipping = flashmask_attention(q, k, v, mask, backend="hopper", return_lse=True)
    visit_every_tile(mask)
    forced = flashmask_attention(q, k, v, mask, backend="hopper", return_lse=True)
    assert torch.equal(skipping[0], forced[0]) and torch.equal(skipping[1], forced[1])


def test_too_many_intervals_are_refused_by_name_and_served_by_choice():
    n = 200
    visible = (torch.arange(n) // 10 % 2 == 0)[:, None].expand(n, n)
    mask = FlashMask.from_dense(visible, max_intervals=20).to(DEVICE)
    q, k, v = random_inputs(rows=n, d=64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="up to 3 intervals a column, got 10"):
        flashmask_attention(q, k, v, mask, backend="hopper")
    passes._announce.cache_clear()
    with pytest.warns(UserWarning, match="takes 'triton': .*up to 3 intervals a column, got 10"):
        chosen = flashmask_attention(q, k, v, mask)
    assert torch.equal(chosen, flashmask_attention(q, k, v, mask, backend="triton"))
