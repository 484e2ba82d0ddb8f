"""The Hopper forward without maxima: anchors that scores outgrow, sink below or never had, against the float64 oracle.

bfloat16 at D 128, and at D 64 with masks without intervals, where it is taken. Column j scores about heights[j] with
every row, in natural units.
"""

import math

import pytest
import torch

from fm_longctx import flashmask_attention
from fm_longctx.kernels.hopper import launch
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, assert_right, dense_attention, random_inputs, visit_every_tile

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
D = 128


def inputs_of(heights, *, batch=1, heads=4, kv_heads=2, d=D, dtype=torch.bfloat16):
    """heights: `[N]`, or `[B, N, H_kv]` for each sample and head its own."""
    n = heights.shape[-1] if heights.dim() == 1 else heights.shape[1]
    q, k, v = random_inputs(batch=batch, rows=n, heads=heads, kv_heads=kv_heads, d=d)
    direction = torch.nn.functional.normalize(torch.ones(d, device=DEVICE), dim=0)
    heights = heights[None, :, None] if heights.dim() == 1 else heights
    q = 0.1 * q + math.sqrt(d) * direction
    k = 0.1 * k + heights.to(DEVICE)[..., None] * direction
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend(q, k, v, mask):
    return flashmask_attention(q, k, v, mask, return_lse=True, backend="hopper")


def compare(q, k, v, mask):
    mask = mask.to(DEVICE)
    assert_right(*attend(q, k, v, mask), q, k, v, mask)


N = 1000
COLUMN = torch.arange(N)
HEIGHTS = {
    "step": lambda by: by * (COLUMN >= 600),
    "stairs": lambda by: by * (COLUMN // 128),
    "peaks": lambda by: by * ((COLUMN % 128 == 127) & (COLUMN > 300)),
    "last column": lambda by: by * (COLUMN == N - 1),
    "sunken": lambda by: -by * (COLUMN >= 300),
    "even": lambda by: 0 * COLUMN,
}
MASKS = {
    "causal": builders.causal(N),
    "full": builders.full(N),
    "documents": builders.causal_document([300, 700]),
    # Rows of the second document, in the middle of a tile, see their first column late.
    "bidirectional documents": builders.document([310, 690]),
    "window": builders.sliding_window(N, 200),
}


# Within an anchor's reach; beyond 2^24, where it rises; beyond 2^100, where the item is computed again.
@pytest.mark.parametrize("by", [5.0, 30.0, 70.0, 120.0, 2000.0])
@pytest.mark.parametrize("shape", HEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_scores_that_leave_their_anchor(mask, shape, by):
    compare(*inputs_of(HEIGHTS[shape](by)), MASKS[mask])


@pytest.mark.parametrize("by", [30.0, 120.0])
@pytest.mark.parametrize("shape", HEIGHTS)
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_scores_that_leave_their_anchor_with_three_consumers(mask, shape, by):
    assert launch.WITHOUT_INTERVALS[64].consumers == 3 and launch.WITHOUT_INTERVALS[64].steady
    compare(*inputs_of(HEIGHTS[shape](by), d=64), MASKS[mask])


def test_scores_by_every_distance_from_their_anchor():
    """From where it rises to beyond 2^128."""
    for by in torch.arange(10.0, 100.0, 1.3).tolist():
        compare(*inputs_of(HEIGHTS["step"](by)), MASKS["causal"])
        compare(*inputs_of(HEIGHTS["last column"](by)), MASKS["full"])


@pytest.mark.parametrize("by", [14.0, 28.0, 42.0, 60.0, 64.0, 68.0, 72.0, 100.0])
@pytest.mark.parametrize("shape", ["stairs", "peaks"])
def test_skipping_changes_no_bit_of_what_rises(shape, by):
    """By 2^20 to 2^60 a tile, and hidden tiles before, between and behind."""
    mask = (builders.causal_document([300, 700]) & builders.sliding_window(N, 200)).to(DEVICE)
    sinks = (builders.causal(N) & builders.lambda_window(N, 100, 250)).to(DEVICE)
    q, k, v = inputs_of(HEIGHTS[shape](by))
    for hidden in (mask, sinks):
        skipping = attend(q, k, v, hidden)
        visit_every_tile(hidden)
        forced = attend(q, k, v, hidden)
        assert torch.equal(skipping[0], forced[0]) and torch.equal(skipping[1], forced[1])


@pytest.mark.parametrize("which", ["all", "first", "last", "every second", "every third"])
@pytest.mark.parametrize("d, n", [(128, 700), (64, 1000)])
def test_items_computed_again_at_every_place(which, d, n):
    """Every CTA takes several items; those of the chosen heads fail: in a row, first, last, in between."""
    batch, heads = 5, 16
    number = torch.arange(batch * heads).view(batch, 1, heads)
    chosen = {
        "all": number >= 0,
        "first": number < 8,
        "last": number >= batch * heads - 8,
        "every second": number % 2 == 0,
        "every third": number % 3 == 2,
    }[which]
    heights = 200.0 * chosen * (torch.arange(n) >= 400)[None, :, None]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert batch * heads * -(-n // launch.forward_config(d, 0).block_m) > 3 * processors
    q, k, v = inputs_of(heights, batch=batch, heads=heads, kv_heads=heads, d=d)
    compare(q, k, v, builders.causal(n))
    compare(q, k, v, builders.full(n))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_no_numbers_spoil_what_they_reach_alone(value):
    mask = builders.causal(N).to(DEVICE)
    q, k, v = inputs_of(HEIGHTS["step"](30.0))
    out, lse = attend(q, k, v, mask)
    spoiled = v.clone()
    spoiled[0, 600, 0, 3] = value
    got, got_lse = attend(q, k, spoiled, mask)
    assert not got[0, 600:, :2, 3].isfinite().any()
    got[0, :, :2, 3] = out[0, :, :2, 3]
    # Items that it reached took their maxima, others have the same bits.
    assert torch.equal(got[:, :, 2:], out[:, :, 2:]) and torch.equal(got[:, :512], out[:, :512])
    assert (got.float() - out.float()).abs().max() <= 0.05 and (got_lse - lse).abs().max() <= 1e-3
    spoiled = k.clone()
    spoiled[0, 600, 0] = value
    got, got_lse = attend(q, spoiled, v, mask)
    assert got[0, 600:, :2].isnan().all()
    assert (got[0, :600].float() - out[0, :600].float()).abs().max() <= 0.05
    assert torch.equal(got[:, :, 2:], out[:, :, 2:]) and (got_lse[:, :, :600] - lse[:, :, :600]).abs().max() <= 1e-3
    spoiled = q.clone()
    spoiled[0, 600, 0] = value
    got, _ = attend(spoiled, k, v, mask)
    assert got[0, 600, 0].isnan().all()
    got[0, 600, 0] = out[0, 600, 0]
    assert (got.float() - out.float()).abs().max() <= 0.05


@pytest.mark.parametrize("by", [5.0, 30.0, 200.0])
def test_float16_keeps_its_maxima(by):
    assert launch.steady(launch.FORWARD[D], torch.bfloat16) and not launch.steady(launch.FORWARD[D], torch.float16)
    for shape in ("step", "stairs", "peaks"):
        compare(*inputs_of(HEIGHTS[shape](by), dtype=torch.float16), builders.causal(N))


def test_values_that_leave_no_room_for_large_p():
    """O would overflow by p that are numbers: the item is computed again, with p of at most 2."""
    q, k, v = inputs_of(HEIGHTS["peaks"](60.0))
    large = (v.double() * 2.0**70).to(torch.bfloat16)
    out, _ = attend(q, k, large, builders.causal(N).to(DEVICE))
    visible = builders.causal(N).to(DEVICE).to_dense()
    exact, _ = dense_attention(q.double(), k.double(), large.double(), visible, 1 / math.sqrt(D))
    assert (out.double() - exact).abs().max() <= 0.05 * 2.0**70


@pytest.mark.parametrize("d", [64, D])
def test_rows_whose_first_scores_are_infinitely_low(d):
    """A full tile of -inf gives no anchor; what follows is far below the 0 that stands for it until then."""
    q, k, v = inputs_of(-250.0 * torch.ones(N), d=d)
    begin = 256
    k[:, :begin] = -3e38
    q = q * 8
    for mask in (MASKS["full"].to(DEVICE), MASKS["causal"].to(DEVICE)):
        out, lse = attend(q, k, v, mask)
        wanted, wanted_lse = dense_attention(
            q.double(), k.double()[:, begin:], v.double()[:, begin:], mask.to_dense()[..., begin:], 1 / math.sqrt(d)
        )
        seen = wanted_lse > float("-inf")
        assert seen.any() and torch.equal(lse > float("-inf"), seen)
        assert (lse - wanted_lse)[seen].abs().max() <= 0.2 and (out - wanted).abs().max() <= 0.05
