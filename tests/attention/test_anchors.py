"""The portable forward without maxima: anchors that scores outgrow, sink below or never had, beside the float64 oracle.

bfloat16. Column j scores about heights[j] with every row, in natural units. Interpreted, a few of many cases.
"""

import itertools
import math

import pytest
import torch

from fm_longctx import flashmask_attention
from fm_longctx.kernels import portable
from fm_longctx.kernels.blocks import choose
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, assert_right, dense_attention, random_inputs, visit_every_tile

INTERPRETED = DEVICE == "cpu"
N, TILE = (150, 32) if INTERPRETED else (1000, 128)
COLUMN = torch.arange(N)
BEGIN = 2 * TILE + TILE // 4
HEIGHTS = {
    "step": lambda by: by * (COLUMN >= 3 * TILE),
    "stairs": lambda by: by * (COLUMN // TILE),
    "peaks": lambda by: by * ((COLUMN % TILE == TILE - 1) & (COLUMN > 2 * TILE)),
    "last column": lambda by: by * (COLUMN == N - 1),
    "sunken": lambda by: -by * (COLUMN >= 2 * TILE),
    "even": lambda by: 0 * COLUMN,
}
MASKS = {
    "causal": builders.causal(N),
    "full": builders.full(N),
    "documents": builders.causal_document([BEGIN, N - BEGIN]),
    # Rows of the second document, in the middle of a tile, see their first column late.
    "bidirectional documents": builders.document([BEGIN + 2, N - BEGIN - 2]),
    "window": builders.sliding_window(N, TILE + TILE // 2),
}
DIMENSIONS = (32,) if INTERPRETED else (64, 128)
# Within float32's reach of the first anchor; with large v beyond it; beyond it, where the item is computed again.
DISTANCES = (5.0, 30.0, 70.0, 84.0, 120.0, 2000.0)
GRID = list(itertools.product(HEIGHTS, MASKS, DISTANCES, DIMENSIONS))
# By the interpreter one of 13: each shape, mask and distance occurs.
GRID = GRID[::13] if INTERPRETED else GRID


def inputs_of(heights, d=DIMENSIONS[0], dtype=torch.bfloat16):
    q, k, v = random_inputs(rows=N, heads=2, kv_heads=1, d=d)
    direction = torch.nn.functional.normalize(torch.ones(d, device=DEVICE), dim=0)
    q = 0.1 * q + math.sqrt(d) * direction
    k = 0.1 * k + heights.to(DEVICE)[None, :, None, None] * direction
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attend(q, k, v, mask):
    return flashmask_attention(q, k, v, mask, return_lse=True, backend="triton")


def with_maxima(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(portable, "choose", lambda *known: choose(*known[:-1], False))
        return attend(*arguments)


def compare(q, k, v, mask):
    mask = mask.to(DEVICE)
    assert_right(*attend(q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("shape, mask, by, d", GRID)
def test_scores_that_leave_their_anchor(shape, mask, by, d):
    compare(*inputs_of(HEIGHTS[shape](by), d), MASKS[mask])


@pytest.mark.skipif(INTERPRETED, reason="slow to interpret")
@pytest.mark.parametrize("d", DIMENSIONS)
def test_scores_by_every_distance_from_their_anchor(d):
    """To beyond 2^128."""
    for by in torch.arange(60.0, 100.0, 1.3).tolist():
        compare(*inputs_of(HEIGHTS["step"](by), d), MASKS["causal"])
        compare(*inputs_of(HEIGHTS["last column"](by), d), MASKS["full"])


@pytest.mark.parametrize("by", [30.0, 100.0] if INTERPRETED else [5.0, 20.0, 30.0, 60.0, 84.0, 100.0])
@pytest.mark.parametrize("shape", ["stairs", "peaks"])
def test_skipping_changes_no_bit(shape, by):
    """With hidden tiles before, between and behind, and items that are computed again."""
    mask = builders.causal_document([BEGIN, N - BEGIN]) & builders.sliding_window(N, TILE + TILE // 2)
    sinks = builders.causal(N) & builders.lambda_window(N, TILE // 2, TILE)
    for hidden, d in itertools.product((mask.to(DEVICE), sinks.to(DEVICE)), DIMENSIONS):
        q, k, v = inputs_of(HEIGHTS[shape](by), d)
        skipping = attend(q, k, v, hidden)
        visit_every_tile(hidden)
        forced = attend(q, k, v, hidden)
        assert torch.equal(skipping[0], forced[0]) and torch.equal(skipping[1], forced[1])
        hidden.cache.clear()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_no_numbers_lead_to_what_they_lead_to_with_maxima(value, monkeypatch):
    mask = MASKS["causal"].to(DEVICE)
    at = 3 * TILE + 5
    for name in "qkv":
        inputs = dict(zip("qkv", inputs_of(HEIGHTS["step"](10.0)), strict=True))
        whole = attend(*inputs.values(), mask)[0]
        inputs[name][0, at, 0, 3] = value
        out, lse = attend(*inputs.values(), mask)
        wanted, wanted_lse = with_maxima(monkeypatch, *inputs.values(), mask)
        assert not out.isfinite().all()
        # Blocks of rows that it reaches take their maxima.
        reached = ~wanted.isfinite().all(-1)
        assert torch.equal(out[reached].nan_to_num(9), wanted[reached].nan_to_num(9))
        assert torch.equal(lse.mT[reached].nan_to_num(9), wanted_lse.mT[reached].nan_to_num(9))
        # Those before it have the same bits as without it.
        assert torch.equal(out[:, : at // TILE * TILE], whole[:, : at // TILE * TILE])
        assert (out - wanted)[~reached].abs().max() <= 0.05


def test_rows_whose_first_scores_are_infinitely_low():
    """A full tile of -inf gives no anchor; what follows is far below the 0 that stands for it until then."""
    q, k, v = inputs_of(-250.0 * torch.ones(N))
    k[:, : 2 * TILE] = -3e38
    q = q * 8
    for mask in (MASKS["full"].to(DEVICE), MASKS["causal"].to(DEVICE)):
        out, lse = attend(q, k, v, mask)
        assert (lse[:, :, : 2 * TILE] == float("-inf")).any() == mask.causal
        wanted, wanted_lse = dense_attention(
            q.double(), k.double()[:, 2 * TILE :], v.double()[:, 2 * TILE :],
            mask.to_dense()[..., 2 * TILE :], 1 / math.sqrt(q.shape[3]),
        )  # fmt: skip
        seen = wanted_lse > float("-inf")
        assert torch.equal(lse > float("-inf"), seen)
        assert (lse - wanted_lse)[seen].abs().max() <= 1e-4 * 2000 and (out - wanted).abs().max() <= 0.05


def test_values_that_leave_no_room_for_large_p():
    """O would overflow by p that are numbers: the item is computed again, with p of at most 1."""
    q, k, v = inputs_of(HEIGHTS["peaks"](60.0))
    large = (v.double() * 2.0**70).to(torch.bfloat16)
    out, _ = attend(q, k, large, MASKS["causal"].to(DEVICE))
    exact, _ = dense_attention(
        q.double(), k.double(), large.double(), MASKS["causal"].to(DEVICE).to_dense(), 1 / math.sqrt(q.shape[3])
    )
    assert (out.double() - exact).abs().max() <= 0.05 * 2.0**70


@pytest.mark.parametrize("by", [30.0] if INTERPRETED else [5.0, 30.0, 200.0])
def test_float16_keeps_its_maxima(by):
    for capability, d in ((None, 32), ((9, 0), 64), ((9, 0), 128)):
        assert choose(capability, 2, d, 0, True, N, True).forward.steady
        assert not choose(capability, 2, d, 0, True, N, False).forward.steady
    for shape in ("sunken", "peaks"):
        compare(*inputs_of(HEIGHTS[shape](by), dtype=torch.float16), MASKS["causal"])
