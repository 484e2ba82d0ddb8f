"""What a mask asks of a layout: the area of every pair of chunks, and the columns that a set of rows sees.

Neighbouring columns mostly hold the same intervals (a document's columns all end where it ends), so a mask is first cut
into *segments*: runs of columns with the same intervals. Everything here costs O(segments), not O(columns): a million
tokens of packed documents are a few thousand segments. A mask whose every column differs costs one segment a column.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fm_longctx.mask.flash_mask import FlashMask

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Up to so many chunks, pairs of them are counted in a table of all pairs: faster than sorting.
_DENSE_CHUNKS = 2048
# Of more pairs of a rank and a segment only some are looked at for the column that most rows see.
_MOST_PAIRS = 1 << 20
# Segments of so many columns on average are kept: they take little beside the mask.
_FEW_COLUMNS = 64


class Segments(NamedTuple):
    """Runs of columns `[first, last)` with the same intervals, over all batch entries and heads of a square mask."""

    first: Ints
    """[S]; within one batch entry and head ascending, the next one's after it."""
    last: Ints
    """[S]."""
    entry: Ints
    """[S]: which batch entry and head, counted through."""
    starts: Ints
    """[K, S]: masked rows `[starts, ends)`, per segment sorted, disjoint and not touching; empty ones are `[N, N)`."""
    ends: Ints
    """[K, S]."""
    diagonal: npt.NDArray[np.bool_]
    """[S]: column j is masked for rows `[0, j)` as well; the intervals of such a segment start at `last` or later."""
    num_entries: int
    num_tokens: int

    def take(self, which: Ints | npt.NDArray[np.bool_]) -> Segments:
        """Some of the segments, by index or by a bool `[S]`."""
        return self._replace(
            first=self.first[which],
            last=self.last[which],
            entry=self.entry[which],
            starts=self.starts[:, which],
            ends=self.ends[:, which],
            diagonal=self.diagonal[which],
        )

    def cut(self, bounds: Ints) -> Segments:
        """The same columns, cut also at these ascending positions."""
        low = np.searchsorted(bounds, self.first, side="right")
        pieces = np.searchsorted(bounds, self.last, side="left") - low + 1
        of = np.repeat(np.arange(len(pieces)), pieces)
        nth = np.arange(len(of)) - np.repeat(pieces.cumsum() - pieces, pieces)
        at = bounds[np.minimum(low[of] + nth, len(bounds) - 1)]
        before = bounds[np.maximum(low[of] + nth - 1, 0)]
        cut = self.take(of)
        return cut._replace(
            first=np.where(nth == 0, cut.first, before), last=np.where(nth == pieces[of] - 1, cut.last, at)
        )


class Needs(NamedTuple):
    """Which column chunks each row chunk sees, sparse: one entry a pair, ascending by row chunk, then column chunk."""

    rows: Ints
    """[E]: row chunk."""
    columns: Ints
    """[E]: column chunk, another than the row chunk."""
    keys: Floats
    """[E]: columns of the column chunk that at least one row of the row chunk sees, at most its size."""


def segments(mask: FlashMask) -> Segments:
    """Segments of a square mask; kept with it if they are few, since a batch's plan, parts and report all ask."""
    known: Segments | None = mask.cache.get("segments")
    if known is None:
        known = _segments(mask)
        if len(known.first) * _FEW_COLUMNS <= mask.num_columns * known.num_entries:
            mask.cache["segments"] = known
    return known


def _segments(mask: FlashMask) -> Segments:
    n = mask.num_columns
    starts = mask.starts.cpu().numpy().reshape(mask.batch * mask.heads, mask.num_intervals, n)
    ends = mask.ends.cpu().numpy().reshape(mask.batch * mask.heads, mask.num_intervals, n)
    diagonal = np.full((starts.shape[0], n), mask.causal)
    if mask.causal and mask.num_intervals:
        # An interval that starts on the diagonal differs in every column; joined with the diagonal it does not.
        joined = starts[:, 0] == np.arange(n, dtype=starts.dtype)
        joined &= ends[:, 0] > starts[:, 0]
        if joined.any():
            starts = starts.copy()
            starts[:, 0][joined] = 0
            diagonal &= ~joined

    begins = np.zeros((starts.shape[0], n), dtype=bool)
    begins[:, :1] = True
    begins[:, 1:] |= diagonal[:, 1:] != diagonal[:, :-1]
    for i in range(mask.num_intervals):
        begins[:, 1:] |= starts[:, i, 1:] != starts[:, i, :-1]
        begins[:, 1:] |= ends[:, i, 1:] != ends[:, i, :-1]
    entry, first = np.nonzero(begins)
    last = np.append(first[1:], n)
    last[last == 0] = n
    return Segments(
        first.astype(np.int64),
        last.astype(np.int64),
        entry.astype(np.int64),
        starts[entry, :, first].T.astype(np.int64),
        ends[entry, :, first].T.astype(np.int64),
        diagonal[entry, first],
        mask.batch * mask.heads,
        n,
    )


def chunk_areas(parts: Segments, bounds: Ints) -> Ints:
    """Unmasked scores of the rows of each chunk, int64 `[chunks]`, summed over batch and heads.

    A masked interval hides max(0, x - start) - max(0, x - end) of the rows below x: sums of ramps, each of which is
    (how many bounds lie below x) x (x) - (sum of those bounds).
    """
    parts = parts.cut(bounds)
    width = parts.last - parts.first
    masked = np.zeros(len(bounds), dtype=np.int64)

    def add_ramps(begin: Ints, count: Ints, total: Ints, sign: int) -> None:
        order = np.argsort(begin, kind="stable")
        below = np.searchsorted(begin[order], bounds, side="left")
        counts = np.concatenate([np.zeros(1, dtype=np.int64), count[order].cumsum()])[below]
        totals = np.concatenate([np.zeros(1, dtype=np.int64), total[order].cumsum()])[below]
        masked[:] += sign * (bounds * counts - totals)

    for starts, ends in zip(parts.starts, parts.ends, strict=True):
        add_ramps(starts, width, width * starts, 1)
        add_ramps(ends, width, width * ends, -1)
    n = width[parts.diagonal]
    first, last = parts.first[parts.diagonal], parts.last[parts.diagonal]
    add_ramps(np.zeros_like(n), n, np.zeros_like(n), 1)
    # Column j's ramp begins at j: no edge lies within a segment, so all of its columns begin before the same edges.
    add_ramps(first, n, n * (first + last - 1) // 2, -1)
    return np.diff(parts.num_entries * parts.num_tokens * bounds - masked)


def tile_work(parts: Segments, bounds: Ints, tile: int) -> Floats:
    """Scores of the tiles that a kernel visits for the rows of each chunk, float64 `[chunks]`: its work.

    A `[tile, tile]` tile is visited unless every column of its column-block hides all of its rows; a chunk that ends
    within a row-block has its share of it. Intervals are counted one by one: a tile that two of them hide together is
    taken as visited.
    """
    n, blocks = parts.num_tokens, -(-parts.num_tokens // tile)
    edges = np.minimum(np.arange(blocks + 1) * tile, n)
    parts = parts.cut(edges)
    width = parts.last - parts.first
    block = parts.first // tile
    group = parts.entry * blocks + block
    # Row-blocks [low, high) that a segment hides wholly: its columns count at low, and no longer at high.
    lows = [-(-starts // tile) for starts in parts.starts]
    highs = [np.where(ends == n, blocks, ends // tile) for ends in parts.ends]
    lows.append(np.zeros_like(block))
    highs.append(np.where(parts.diagonal, block, 0))
    low, high = np.concatenate(lows), np.concatenate(highs)
    hides = low < high
    at = (np.tile(group, len(lows)) * (blocks + 1))[hides]
    columns = np.tile(width, len(lows))[hides]
    where = np.concatenate([at + low[hides], at + high[hides]])
    order = np.argsort(where, kind="stable")
    hidden = np.concatenate([columns, -columns])[order].cumsum()
    where = where[order]
    whole = np.flatnonzero(hidden[:-1] == np.diff(edges)[where[:-1] // (blocks + 1) % blocks])
    rows = where % (blocks + 1)
    skipped = np.bincount(rows[whole], minlength=blocks + 1) - np.bincount(rows[whole + 1], minlength=blocks + 1)
    # Among a rank's rows, which lie close together, those of a last, shorter row-block do not take a tile's height.
    visited = (parts.num_entries * blocks - skipped[:-1].cumsum()) * np.diff(edges) * float(tile)
    return np.diff(np.interp(bounds, edges, np.concatenate([np.zeros(1), visited.cumsum()])))


def chunk_needs(parts: Segments, bounds: Ints) -> Needs:
    """Which other chunks' columns each row chunk sees.

    Exact for one batch entry and head, else the sum over them up to the chunk's size. Columns hidden jointly by two
    intervals, or by an interval and the diagonal, count as seen.
    """
    chunks, sizes = len(bounds) - 1, np.diff(bounds)
    parts = parts.cut(bounds)
    width = parts.last - parts.first
    column = np.searchsorted(bounds, parts.first, side="right") - 1
    # Between the row chunks that its intervals hide wholly, a segment is seen.
    begin = np.where(parts.diagonal, column, 0)
    begins, ends = [], []
    for i in range(len(parts.starts) + 1):
        if i < len(parts.starts):
            hidden = np.searchsorted(bounds, parts.starts[i], side="left")
            shown = np.searchsorted(bounds, parts.ends[i], side="right") - 1
            # An interval within one chunk hides none.
            hidden, shown = np.where(hidden < shown, (hidden, shown), (begin, begin))
        else:
            hidden = shown = np.full_like(begin, chunks)
        begins.append(begin)
        ends.append(hidden)
        begin = np.maximum(begin, shown)
    first, count = np.concatenate(begins), np.maximum(np.concatenate(ends) - np.concatenate(begins), 0)
    of = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(of)) - np.repeat(count.cumsum() - count, count) + first[of]
    of %= max(len(width), 1)
    cell, keys = row * chunks + column[of], width[of]
    if chunks <= _DENSE_CHUNKS:
        table = np.bincount(cell, keys, chunks * chunks)
        cells = np.flatnonzero(table)
        keys = table[cells]
    else:
        cells, where = np.unique(cell, return_inverse=True)
        keys = np.bincount(where, keys, len(cells))
    rows, columns = np.divmod(cells, max(chunks, 1))
    remote = rows != columns
    return Needs(rows[remote], columns[remote], np.minimum(keys, sizes[columns])[remote])


def seen_ranges(parts: Segments, rows: Ints) -> tuple[Ints, Ints]:
    """`[S]` each: of every segment the columns `[first, stop)` that at least one of the ascending rows sees."""
    # The last row that sees a segment, found from its last interval to its first.
    last_row = np.full(len(parts.first), rows[-1] if len(rows) else -1)
    before = np.concatenate([np.array([-1]), rows])
    for starts, ends in zip(parts.starts[::-1], parts.ends[::-1], strict=True):
        caught = np.flatnonzero((starts <= last_row) & (last_row < ends))
        last_row[caught] = before[np.searchsorted(rows, starts[caught])]
    stop = np.where(parts.diagonal, np.minimum(parts.last, last_row + 1), parts.last)
    return parts.first, np.where(last_row >= 0, np.maximum(stop, parts.first), parts.first)


def seen_columns(parts: Segments, rows: Ints) -> npt.NDArray[np.bool_]:
    """Bool `[N]`: the columns of the segments that at least one of the ascending rows sees, in any entry or head."""
    return covered(*seen_ranges(parts, rows), parts.num_tokens)


def covered(first: Ints, stop: Ints, n: int) -> npt.NDArray[np.bool_]:
    """Bool `[n]`: the positions in any of the ranges `[first, stop)`."""
    some = stop > first
    change = np.bincount(first[some], minlength=n + 1) - np.bincount(stop[some], minlength=n + 1)
    return change[:-1].cumsum() > 0


def seen_areas(parts: Segments, rows: Ints) -> Ints:
    """int64 `[S]`: visible scores of the ascending rows in each segment."""
    width = parts.last - parts.first
    visible = np.full(len(width), len(rows)) * width
    for starts, ends in zip(parts.starts, parts.ends, strict=True):
        visible -= (np.searchsorted(rows, ends) - np.searchsorted(rows, starts)) * width
    # Rows above the diagonal: how many lie below column j, summed over the columns of the segment. Those above its
    # first column count in each, the others in the columns after them.
    summed = np.concatenate([np.zeros(1, dtype=np.int64), rows.cumsum()])
    above, until = np.searchsorted(rows, parts.first), np.searchsorted(rows, parts.last)
    hidden = above * width + (until - above) * (parts.last - 1) - (summed[until] - summed[above])
    return visible - np.where(parts.diagonal, hidden, 0)


def longest_lists(parts: Segments, bounds: Ints, owners: Ints, world_size: int) -> Floats:
    """`[2, ranks]`: rows of each rank that see the column that most of its rows see, of its own and of other ranks'
    columns; in the batch entry and head that has most. Of very many segments some are looked at."""
    parts = parts.cut(bounds)
    parts = parts.take(np.arange(0, len(parts.first), 1 + len(parts.first) * world_size // _MOST_PAIRS))
    sizes = np.zeros((world_size, len(owners) + 1), dtype=np.int64)
    sizes[owners, np.arange(1, len(owners) + 1)] = np.diff(bounds)
    before = sizes.cumsum(1)

    def rows_below(x: Ints) -> Ints:
        """`[ranks, S]`: rows of each rank below a position."""
        chunk = np.clip(np.searchsorted(bounds, x, side="right") - 1, 0, len(owners) - 1)
        below: Ints = before[:, chunk]
        below[owners[chunk], np.arange(len(x))] += x - bounds[chunk]
        return below

    # The first column of a segment is the one that most see.
    seeing = before[:, -1:] - np.where(parts.diagonal, rows_below(parts.first), 0)
    for starts, ends in zip(parts.starts, parts.ends, strict=True):
        seeing -= rows_below(ends) - rows_below(starts)
    source = owners[np.searchsorted(bounds, parts.first, side="right") - 1]
    own = source == np.arange(world_size)[:, None]
    return np.stack([np.where(some, seeing, 0).max(1, initial=0) for some in (own, ~own)]).astype(np.float64)


def row_area(parts: Segments) -> Ints:
    """int64 `[N]`: visible scores of each row, summed over batch and heads."""
    return chunk_areas(parts, np.arange(parts.num_tokens + 1))


def seen_by(parts: Segments, summed: Floats) -> tuple[Ints, Floats]:
    """`[N]` each: how many rows see each column, and the sum of something over them. Segments of one entry only.

    Args:
        summed: `[N + 1]`, the sum of that over rows `[0, r)`.
    """
    n = parts.num_tokens
    of = np.repeat(np.arange(len(parts.first)), parts.last - parts.first)
    hidden_rows = np.where(parts.diagonal[of], np.arange(n), 0)
    hidden = summed[hidden_rows]
    for starts, ends in zip(parts.starts, parts.ends, strict=True):
        hidden_rows = hidden_rows + (ends - starts)[of]
        hidden = hidden + (summed[ends] - summed[starts])[of]
    return n - hidden_rows, summed[-1] - hidden
