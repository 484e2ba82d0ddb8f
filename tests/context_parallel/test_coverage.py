"""Segments, chunk areas and seen columns, against dense booleans."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.context_parallel.coverage import chunk_tables, seen_columns, segments
from fm_longctx.mask import builders
from tests.mask.oracle import dense_of_intervals, raw_masks


@st.composite
def masks_with_bounds(draw):
    n = draw(st.integers(1, 9))
    raw = draw(raw_masks(max_intervals=3, shape=(draw(st.integers(1, 2)), draw(st.integers(1, 2)), n, n)))
    if draw(st.booleans()):
        # Equal neighbours, so that segments are longer than a column.
        raw = raw._replace(starts=raw.starts[..., :1].expand_as(raw.starts), ends=raw.ends[..., :1].expand_as(raw.ends))
    inner = draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
    return raw, np.array([0, *sorted(inner), n])


@settings(max_examples=150, deadline=None)
@given(masks_with_bounds())
def test_chunk_tables(case):
    raw, bounds = case
    dense = dense_of_intervals(raw).numpy()
    parts = segments(FlashMask(*raw[:2], causal=raw.causal), bounds)
    area, visible = chunk_tables(parts, bounds)
    for r in range(len(bounds) - 1):
        for c in range(len(bounds) - 1):
            tile = dense[:, :, bounds[r] : bounds[r + 1], bounds[c] : bounds[c + 1]]
            assert area[r, c] == tile.sum()
            if r != c:
                assert visible[r, c] == min(tile.shape[3], tile.any(2).sum())


@settings(max_examples=150, deadline=None)
@given(masks_with_bounds(), st.data())
def test_seen_columns(case, data):
    raw, bounds = case
    n = raw.num_rows
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=np.int64)
    parts = segments(FlashMask(*raw[:2], causal=raw.causal), bounds)
    expected = dense_of_intervals(raw).numpy()[:, :, rows].any(axis=(0, 1, 2))
    assert seen_columns(parts, rows).tolist() == expected.tolist()

    keep = parts.first % 2 == 0
    kept = np.zeros(n, dtype=bool)
    for first, last in zip(parts.first[keep], parts.last[keep], strict=True):
        kept[first:last] = True
    if raw.starts.shape[:2] == (1, 1):
        assert seen_columns(parts.only(keep), rows).tolist() == (expected & kept).tolist()


def test_segments_of_documents_are_few():
    lengths = [700, 20_000, 1, 300, 5_000]
    bounds = np.array([0, 10_000, 20_000, sum(lengths)])
    cuts = {0, 10_000, 20_000, *np.cumsum(lengths)[:-1].tolist()}
    for mask in (builders.causal_document(lengths), builders.document(lengths)):
        assert segments(mask, bounds).first.tolist() == sorted(cuts)


def test_an_interval_on_the_diagonal_is_joined_with_it():
    """Under causality, masked down from the diagonal to one row: a staircase in memory, one segment here."""
    n = 50
    starts = torch.arange(n, dtype=torch.int32).view(1, 1, 1, n)
    mask = FlashMask(starts, torch.full_like(starts, n - 1), causal=True)
    parts = segments(mask, np.array([0, n]))
    assert parts.first.tolist() == [0, n - 1]
