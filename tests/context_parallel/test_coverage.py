"""Segments, chunk areas and seen columns, against dense booleans."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.context_parallel.coverage import (
    chunk_areas,
    chunk_needs,
    longest_lists,
    seen_areas,
    seen_columns,
    seen_ranges,
    segments,
    tile_work,
)
from fm_longctx.mask import builders
from fm_longctx.mask.tiles import SKIPPED, tile_states
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
def test_areas_and_needs_of_chunks(case):
    raw, bounds = case
    dense = dense_of_intervals(raw).numpy()
    parts = segments(FlashMask(*raw[:2], causal=raw.causal))
    chunks = len(bounds) - 1
    assert chunk_areas(parts, bounds).tolist() == [dense[:, :, bounds[r] : bounds[r + 1]].sum() for r in range(chunks)]
    needs = chunk_needs(parts, bounds)
    found = {(r, c): keys for r, c, keys in zip(*needs, strict=True)}
    assert list(found) == sorted(found) and len(found) == len(needs.rows)
    for r in range(chunks):
        for c in range(chunks):
            tile = dense[:, :, bounds[r] : bounds[r + 1], bounds[c] : bounds[c + 1]]
            if r != c:
                # A column may be hidden by the diagonal and an interval, or by two, together: then it counts as seen.
                assert found.get((r, c), 0) >= min(tile.shape[3], tile.any(2).sum())
            else:
                assert (r, c) not in found


@settings(max_examples=100, deadline=None)
@given(masks_with_bounds(), st.sampled_from([1, 2, 3, 4]))
def test_work_is_that_of_the_tiles_that_are_not_hidden(case, tile):
    raw, bounds = case
    n = raw.num_rows
    dense = dense_of_intervals(raw).numpy()
    parts = segments(FlashMask(*raw[:2], causal=raw.causal))
    edges = np.minimum(np.arange(-(-n // tile) + 1) * tile, n)
    work = tile_work(parts, edges, tile)
    for r in range(len(edges) - 1):
        visible = [
            dense[:, :, edges[r] : edges[r + 1], edges[c] : edges[c + 1]].any((2, 3)).sum()
            for c in range(len(edges) - 1)
        ]
        assert work[r] >= tile * (edges[r + 1] - edges[r]) * sum(visible)
        if tile == 1:
            assert work[r] == sum(visible)
    # Chunks share out the same work.
    assert tile_work(parts, bounds, tile).sum() == pytest.approx(work.sum())


def test_tiles_of_documents_are_counted_exactly():
    for lengths in ([700, 20, 1, 300], [256, 128, 640]):
        mask = builders.causal_document(lengths)
        states = tile_states(mask, 128, 128)[0, 0]
        edges = np.minimum(np.arange(len(states) + 1) * 128, mask.num_rows)
        expected = (states != SKIPPED).sum(1).numpy() * 128.0 * np.diff(edges)
        assert tile_work(segments(mask), edges, 128).tolist() == expected.tolist()


@settings(max_examples=150, deadline=None)
@given(masks_with_bounds(), st.data())
def test_what_rows_see(case, data):
    raw, bounds = case
    n = raw.num_rows
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=np.int64)
    parts = segments(FlashMask(*raw[:2], causal=raw.causal))
    dense = dense_of_intervals(raw).numpy()[:, :, rows]
    expected = dense.any(axis=(0, 1, 2))
    assert seen_columns(parts, rows).tolist() == expected.tolist()

    # Cut at bounds they are the same columns.
    pieces = parts.cut(bounds)
    assert seen_columns(pieces, rows).tolist() == expected.tolist()
    width = pieces.last - pieces.first
    assert (width > 0).all() and width.sum() == n * raw.starts.shape[0] * raw.starts.shape[1]
    assert all(not ((bounds > first) & (bounds < last)).any() for first, last in zip(*pieces[:2], strict=True))
    first, stop = seen_ranges(pieces, rows)
    by_entry = dense.reshape(dense.shape[0] * dense.shape[1], *dense.shape[2:])
    for at, (entry, start, last) in enumerate(zip(pieces.entry, pieces.first, pieces.last, strict=True)):
        assert seen_areas(pieces, rows)[at] == by_entry[entry, :, start:last].sum()
        seen = np.flatnonzero(by_entry[entry, :, start:last].any(0)) + start
        assert seen.tolist() == list(range(first[at], stop[at]))


@settings(max_examples=150, deadline=None)
@given(masks_with_bounds(), st.data())
def test_the_column_that_most_rows_see(case, data):
    raw, bounds = case
    ranks = data.draw(st.integers(1, 4))
    owners = np.array(
        data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    )
    dense = dense_of_intervals(raw).numpy()
    source = np.repeat(owners, np.diff(bounds))
    own, others = longest_lists(segments(FlashMask(*raw[:2], causal=raw.causal)), bounds, owners, ranks)
    for rank in range(ranks):
        seeing = dense[:, :, source == rank].sum(2)
        assert own[rank] == seeing[..., source == rank].max(initial=0)
        assert others[rank] == seeing[..., source != rank].max(initial=0)


def test_segments_of_documents_are_few():
    lengths = [700, 20_000, 1, 300, 5_000]
    bounds = np.array([0, 10_000, 20_000, sum(lengths)])
    cuts = {0, 10_000, 20_000, *np.cumsum(lengths)[:-1].tolist()}
    for mask in (builders.causal_document(lengths), builders.document(lengths)):
        assert segments(mask).cut(bounds).first.tolist() == sorted(cuts)


def test_an_interval_on_the_diagonal_is_joined_with_it():
    """Under causality, masked down from the diagonal to one row: a staircase in memory, one segment here."""
    n = 50
    starts = torch.arange(n, dtype=torch.int32).view(1, 1, 1, n)
    mask = FlashMask(starts, torch.full_like(starts, n - 1), causal=True)
    parts = segments(mask)
    assert parts.first.tolist() == [0, n - 1]
