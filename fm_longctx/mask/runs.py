"""Runs of masked rows per column, collected from blocks of a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor


class MaskedRuns:
    """The intervals of a mask that is seen block by block: any columns, but of a column its rows from top to bottom.

    A run that crosses from one block to the next stays one interval. Memory is O(K x N_k), whatever the blocks: of a
    column with more than `max_intervals` runs the further ones are counted only.

    Args:
        batch, heads, num_rows, num_columns: of the mask.
        max_intervals: the largest K allowed, >= 0.

    Raises:
        ValueError: `max_intervals` is not an integer >= 0.
    """

    def __init__(
        self, batch: int, heads: int, num_rows: int, num_columns: int, *, max_intervals: int, device: torch.device
    ) -> None:
        if isinstance(max_intervals, bool) or not isinstance(max_intervals, int) or max_intervals < 0:
            raise ValueError(f"max_intervals must be >= 0, got {max_intervals}.")
        self._num_rows, self._max_intervals = num_rows, max_intervals
        # Per column: how many runs have begun, and whether the last row seen is masked.
        self._begun = torch.zeros((batch, heads, num_columns), dtype=torch.int32, device=device)
        self._inside = torch.zeros((batch, heads, num_columns), dtype=torch.bool, device=device)
        self._starts = torch.empty((batch, heads, 0, num_columns), dtype=torch.int32, device=device)
        self._ends = torch.empty_like(self._starts)

    def add(self, masked: Tensor, *, b: int, h: int, first_row: int, first_column: int) -> None:
        """Take in the block bool `[rows, columns]`, True = masked, that begins at this row and column."""
        columns = slice(first_column, first_column + masked.shape[1])
        begun, inside = self._begun[b, h, columns], self._inside[b, h, columns]
        above = torch.cat([inside[None], masked[:-1]])
        changes = masked != above
        if not bool(changes.any()):
            return
        begins = changes & masked
        # A run's end has the slot of the run that began last.
        slot = begun + begins.cumsum(0, dtype=torch.int32) - 1
        begin, end = self._edges(begins, slot), self._edges(changes & above, slot)
        self._grow(int(begin[0].max()) + 1 if begin[0].numel() else 0)
        for bounds, (slots, rows, offsets) in ((self._starts, begin), (self._ends, end)):
            bounds[b, h, slots, offsets + first_column] = (rows + first_row).int()
        begun.copy_(slot[-1] + 1)
        inside.copy_(masked[-1])

    def intervals(self) -> tuple[Tensor, Tensor]:
        """starts, ends int32 `[B, H_mask, K, N_k]`, with the smallest K.

        Raises:
            ValueError: a column has more runs than `max_intervals`; it is named.
        """
        most = int(self._begun.max()) if self._begun.numel() else 0
        if most > self._max_intervals:
            b, h, column = (self._begun > self._max_intervals).nonzero()[0].tolist()
            raise ValueError(
                f"column {column} (batch {b}, head {h}) has {int(self._begun[b, h, column])} masked intervals, "
                f"more than max_intervals={self._max_intervals}. Pass max_intervals={most} to keep this mask exactly."
            )
        return self._starts, self._ends

    def _edges(self, edges: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, row and column of each edge that is kept."""
        rows, columns = (edges & (slot < self._max_intervals)).nonzero(as_tuple=True)
        return slot[rows, columns].long(), rows, columns

    def _grow(self, slots: int) -> None:
        """Have at least this many slots. An unused one is empty, one that nothing ends lasts to the last row."""
        b, h, k, n_k = self._starts.shape
        if slots > k:
            blank = self._starts.new_full((b, h, slots - k, n_k), self._num_rows)
            self._starts = torch.cat([self._starts, blank], dim=2)
            self._ends = torch.cat([self._ends, blank], dim=2)
