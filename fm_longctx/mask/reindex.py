"""Intervals of a subset of rows and columns, and of the intersection of two masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fm_longctx.mask.canonical import diagonal

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask


def select(mask: FlashMask, rows: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Intervals of `dense[rows][:, columns]`, exactly, for any ascending rows and any columns in any order.

    With the rows in ascending order an interval `[s, e)` covers exactly the local rows
    `[searchsorted(rows, s), searchsorted(rows, e))`, whatever rows were left out. Causality becomes one more interval,
    so the result is not causal and has at most one interval a column more.

    Args:
        mask: the global mask.
        rows: int64 `[n]`, strictly ascending, in `[0, N_q)`.
        columns: int64 `[m]`, in `[0, N_k)`, any order, repeats allowed; all of them if not given.

    Raises:
        ValueError: indices of the wrong rank, dtype or range, or rows not strictly ascending (with other orders an
            interval would split).

    Returns:
        starts, ends: int32 `[B, H_mask, K + causal, m]`, not yet canonical.
    """
    _check_indices("rows", rows, mask.num_rows)
    if rows.numel() > 1 and not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError("rows must be strictly ascending. Sort them (rows.sort().values) and permute q to match.")
    rows = rows.to(mask.device)
    starts, ends = mask.starts, mask.ends
    hidden = diagonal(mask.num_rows, mask.num_columns, mask.device) if mask.causal else None
    if columns is not None:
        _check_indices("columns", columns, mask.num_columns)
        columns = columns.to(mask.device)
        starts, ends = starts[..., columns], ends[..., columns]
        hidden = hidden[columns] if hidden is not None else None
    if hidden is not None:
        above = hidden.expand(mask.batch, mask.heads, 1, -1)
        starts = torch.cat([torch.zeros_like(above), starts], dim=2)
        ends = torch.cat([above, ends], dim=2)
    # How many of the rows lie below each position, once: a search for each column takes longer.
    below = torch.zeros(mask.num_rows + 1, dtype=torch.int32, device=mask.device)
    below[rows.long() + 1] = 1
    below = below.cumsum(0, dtype=torch.int32)
    return below[starts.long()], below[ends.long()]


def intersect(a: FlashMask, b: FlashMask) -> tuple[Tensor, Tensor]:
    """Intervals of what is visible in both: the union of theirs. Batch and heads broadcast."""
    if (a.num_rows, a.num_columns) != (b.num_rows, b.num_columns):
        raise ValueError(
            f"masks must have the same rows and columns, got {a.num_rows} x {a.num_columns} "
            f"and {b.num_rows} x {b.num_columns}."
        )
    if a.device != b.device:
        raise ValueError(f"masks must be on one device, got {a.device} and {b.device}. Move one with .to(device).")
    for name, x, y in (("batch", a.batch, b.batch), ("heads", a.heads, b.heads)):
        if x != y and 1 not in (x, y):
            raise ValueError(f"masks must agree in {name} (or one have 1), got {x} and {y}.")
    shape = (max(a.batch, b.batch), max(a.heads, b.heads), -1, -1)
    starts = torch.cat([a.starts.expand(shape), b.starts.expand(shape)], dim=2)
    ends = torch.cat([a.ends.expand(shape), b.ends.expand(shape)], dim=2)
    return starts, ends


def _check_indices(name: str, indices: Tensor, limit: int) -> None:
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be a 1-D integer tensor, got {indices.dtype} {list(indices.shape)}.")
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= limit):
        raise ValueError(f"{name} must lie in [0, {limit}), got {int(indices.min())}..{int(indices.max())}.")
