"""Between intervals and a dense boolean matrix, for small masks, tests and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fm_longctx.mask.canonical import diagonal

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask


def from_intervals(mask: FlashMask) -> Tensor:
    """Bool `[B, H_mask, N_q, N_k]`, True = visible."""
    rows = torch.arange(mask.num_rows, dtype=torch.int32, device=mask.device)[:, None]
    shape = (mask.batch, mask.heads, mask.num_rows, mask.num_columns)
    visible = torch.ones(shape, dtype=torch.bool, device=mask.device)
    for i in range(mask.num_intervals):
        start, end = mask.starts[:, :, i, None, :], mask.ends[:, :, i, None, :]
        visible &= (rows < start) | (rows >= end)
    if mask.causal:
        visible &= rows >= diagonal(mask.num_rows, mask.num_columns, mask.device)
    return visible


def to_intervals(visible: Tensor, *, max_intervals: int) -> tuple[Tensor, Tensor]:
    """starts, ends int32 `[B, H_mask, K, N_k]`, with the smallest K.

    Args:
        visible: bool `[N_q, N_k]` or `[B, H_mask, N_q, N_k]`, True = visible.
        max_intervals: the largest K allowed, >= 0.

    Raises:
        ValueError: another dtype or rank, or a column with more masked runs than `max_intervals`; it is named.
    """
    if visible.dtype != torch.bool or visible.ndim not in (2, 4):
        raise ValueError(
            f"visible must be bool [N_q, N_k] or [B, H_mask, N_q, N_k], got {visible.dtype} {list(visible.shape)}."
        )
    if max_intervals < 0:
        raise ValueError(f"max_intervals must be >= 0, got {max_intervals}.")
    masked = ~(visible[None, None] if visible.ndim == 2 else visible)
    b, h, n_q, n_k = masked.shape
    # Runs of masked rows begin and end where the column, padded with visible rows, changes.
    padded = torch.zeros((b, h, n_k, n_q + 2), dtype=torch.int8, device=masked.device)
    padded[..., 1:-1] = masked.transpose(2, 3)
    change = padded.diff(dim=-1)
    runs = (change == 1).sum(-1)
    most = int(runs.max()) if runs.numel() else 0
    if most > max_intervals:
        first = (runs > max_intervals).nonzero()[0].tolist()
        raise ValueError(
            f"column {first[2]} (batch {first[0]}, head {first[1]}) has {int(runs[tuple(first)])} masked intervals, "
            f"more than max_intervals={max_intervals}. Pass max_intervals={most} to keep this mask exactly."
        )
    starts = torch.full((b, h, most, n_k), n_q, dtype=torch.int32, device=masked.device)
    ends = starts.clone()
    slot = (change == 1).cumsum(-1) - 1
    for bounds, edge in ((starts, 1), (ends, -1)):
        i_b, i_h, column, row = (change == edge).nonzero(as_tuple=True)
        bounds[i_b, i_h, slot[i_b, i_h, column, row], column] = row.int()
    return starts, ends
