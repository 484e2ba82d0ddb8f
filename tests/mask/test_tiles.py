"""Tile states and areas against counting scores one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.mask import causal, causal_document, full, tiles
from tests.mask.oracle import dense_of_intervals, raw_masks
from tests.properties import examples


def brute_force(dense, block_m, block_n):
    """(areas, sizes) int64 `[B, H, R, C]`, summed tile by tile."""
    b, h, n_q, n_k = dense.shape
    areas = torch.zeros(b, h, -(-n_q // block_m), -(-n_k // block_n), dtype=torch.int64)
    sizes = torch.zeros_like(areas)
    for r in range(areas.shape[2]):
        for c in range(areas.shape[3]):
            tile = dense[:, :, r * block_m : (r + 1) * block_m, c * block_n : (c + 1) * block_n]
            areas[:, :, r, c] = tile.sum((2, 3))
            sizes[:, :, r, c] = tile.shape[2] * tile.shape[3]
    return areas, sizes


@settings(max_examples=examples(300))
@given(raw_masks(), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 7, 1 << 23]))
def test_states_and_areas(raw, block_m, block_n, cells_at_once):
    mask = FlashMask(raw.starts, raw.ends, causal=raw.causal, num_rows=raw.num_rows)
    areas, sizes = brute_force(dense_of_intervals(raw), block_m, block_n)
    expected = torch.full_like(areas, tiles.PARTIAL)
    expected[areas == sizes] = tiles.FULL
    expected[areas == 0] = tiles.SKIPPED
    with pytest.MonkeyPatch.context() as patch:
        # Few cells at once: the columns are taken in several passes, as for a long mask.
        patch.setattr(tiles, "_MAX_CELLS", cells_at_once)
        states = tiles.tile_states(mask, block_m, block_n)
    assert states.dtype == torch.uint8
    assert torch.equal(states.long(), expected)
    assert torch.equal(tiles.tile_area(mask, block_m, block_n), areas)


def test_a_tile_masked_only_jointly_is_skipped():
    # Each interval masks half of the upper tile; neither masks it alone.
    starts = torch.tensor([0, 2], dtype=torch.int32).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    ends = torch.tensor([2, 4], dtype=torch.int32).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    mask = FlashMask(starts, ends, causal=False, num_rows=8)
    assert tiles.tile_states(mask, 4, 4)[0, 0].tolist() == [[tiles.SKIPPED], [tiles.FULL]]


@settings(max_examples=examples(50))
@given(raw_masks(), st.integers(1, 4), st.integers(1, 4))
def test_sparsity(raw, block_m, block_n):
    mask = FlashMask(raw.starts, raw.ends, causal=raw.causal, num_rows=raw.num_rows)
    areas, _ = brute_force(dense_of_intervals(raw), block_m, block_n)
    expected = float((areas == 0).double().mean()) if areas.numel() else 0.0
    assert mask.sparsity((block_m, block_n)) == pytest.approx(expected)


def test_sparsity_by_hand():
    assert full(256).sparsity() == 0.0
    assert causal(512).sparsity() == 6 / 16
    assert causal_document([256, 256]).sparsity(128) == 10 / 16
    with pytest.raises(ValueError, match="block must be positive, got 0"):
        full(4).sparsity(0)


def test_counts_do_not_overflow():
    n = 1 << 20
    assert int(tiles.tile_area(full(n), n, n)) == n * n
    assert int(tiles.tile_area(causal(n), n // 2, n)[0, 0, 1, 0]) == (n * (n + 1) - n // 2 * (n // 2 + 1)) // 2
