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


class Segments(NamedTuple):
    """Runs of columns `[first, last)` with the same intervals, over all batch entries and heads of a square mask."""

    first: Ints
    """[S]; within one batch entry and head ascending, the next one's after it."""
    last: Ints
    """[S]."""
    starts: Ints
    """[K, S]: masked rows `[starts, ends)`, per segment sorted, disjoint and not touching; empty ones are `[N, N)`."""
    ends: Ints
    """[K, S]."""
    diagonal: npt.NDArray[np.bool_]
    """[S]: column j is masked for rows `[0, j)` as well; the intervals of such a segment start at `last` or later."""
    num_tokens: int

    def only(self, keep: npt.NDArray[np.bool_]) -> Segments:
        """The segments where `keep` [S] is true."""
        return Segments(
            self.first[keep],
            self.last[keep],
            self.starts[:, keep],
            self.ends[:, keep],
            self.diagonal[keep],
            self.num_tokens,
        )


def segments(mask: FlashMask, bounds: Ints) -> Segments:
    """Segments of a square mask, cut also at the chunk bounds, ascending int64 `[chunks + 1]` from 0 to N."""
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
    begins[:, bounds[:-1]] = True
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
        starts[entry, :, first].T.astype(np.int64),
        ends[entry, :, first].T.astype(np.int64),
        diagonal[entry, first],
        n,
    )


def chunk_tables(parts: Segments, bounds: Ints) -> tuple[Ints, Ints]:
    """Area and visible columns of every (row chunk, column chunk), int64 `[chunks, chunks]` each.

    The area is the exact number of unmasked scores, summed over batch and heads. The visible columns are those that at
    least one row of the row chunk sees: exact for one batch entry and head, else their sum, at most the chunk's size;
    on the causal diagonal the whole chunk.

    The area comes as in `fm_longctx.mask.tiles`: an interval's overlap with a row chunk is the difference of two
    ramps, summed over a column chunk as (how many bounds lie above an edge) x (edge) - (sum of those bounds).
    """
    chunks = len(bounds) - 1
    sizes = np.diff(bounds)
    width = parts.last - parts.first
    column_chunk = np.searchsorted(bounds, parts.first, side="right") - 1
    shape = (chunks + 1, chunks)

    cells: list[Ints] = []
    counts: list[Ints] = []
    totals: list[Ints] = []
    hidden_cells: list[Ints] = []
    hidden_counts: list[Ints] = []
    for starts, ends in zip(parts.starts, parts.ends, strict=True):
        used = starts < ends
        n, column = width[used], column_chunk[used]
        for x, sign in ((starts[used], 1), (ends[used], -1)):
            cells.append(np.searchsorted(bounds, x) * chunks + column)
            counts.append(sign * n)
            totals.append(sign * n * x)
        # The row chunks that lie wholly inside the interval.
        above = np.searchsorted(bounds, starts[used])
        below = np.searchsorted(bounds, ends[used], side="right") - 1
        inside = above < below
        for row, sign in ((above, 1), (below, -1)):
            hidden_cells.append((row * chunks + column)[inside])
            hidden_counts.append((sign * n)[inside])
    n, column = width[parts.diagonal], column_chunk[parts.diagonal]
    sum_of_columns = n * (parts.first + parts.last - 1)[parts.diagonal] // 2
    cells += [column, (column + 1) * chunks + column]
    counts += [n, -n]
    totals += [np.zeros_like(n), -sum_of_columns]
    hidden_cells += [column, column * chunks + column]
    hidden_counts += [n, -n]

    def table(cells: list[Ints], values: list[Ints]) -> Ints:
        """Sum per cell, then down the row edges. float64 sums are exact below 2^53."""
        flat = np.bincount(np.concatenate(cells), np.concatenate(values), shape[0] * shape[1])
        return flat.reshape(shape).cumsum(0).astype(np.int64)

    entries = int(width.sum()) // parts.num_tokens if parts.num_tokens else 0
    masked = np.diff(bounds[:, None] * table(cells, counts) - table(cells, totals), axis=0)
    area = entries * sizes[:, None] * sizes[None, :] - masked
    visible = np.minimum(sizes, entries * sizes - table(hidden_cells, hidden_counts)[:-1])
    return area, visible


def seen_columns(parts: Segments, rows: Ints) -> npt.NDArray[np.bool_]:
    """Bool `[N]`: the columns of the segments that at least one of the ascending rows sees, in any entry or head."""
    # The last row that sees a segment, found from its last interval to its first.
    last_row = np.full(len(parts.first), rows[-1] if len(rows) else -1)
    before = np.concatenate([np.array([-1]), rows])
    for starts, ends in zip(parts.starts[::-1], parts.ends[::-1], strict=True):
        caught = np.flatnonzero((starts <= last_row) & (last_row < ends))
        last_row[caught] = before[np.searchsorted(rows, starts[caught])]
    stop = np.where(parts.diagonal, np.minimum(parts.last, last_row + 1), parts.last)
    some = (last_row >= 0) & (stop > parts.first)
    change = np.bincount(parts.first[some], minlength=parts.num_tokens + 1)
    change -= np.bincount(stop[some], minlength=parts.num_tokens + 1)
    return change[:-1].cumsum() > 0
