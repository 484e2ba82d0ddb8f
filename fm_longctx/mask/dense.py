"""Between intervals and a dense boolean matrix, for small masks, tests and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fm_longctx.mask.canonical import diagonal
from fm_longctx.mask.runs import MaskedRuns

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
    dense = visible[None, None] if visible.ndim == 2 else visible
    b, h, n_q, n_k = dense.shape
    runs = MaskedRuns(b, h, n_q, n_k, max_intervals=max_intervals, device=dense.device)
    if n_q:
        for i in range(b):
            for j in range(h):
                runs.add(~dense[i, j], b=i, h=j, first_row=0, first_column=0)
    return runs.intervals()
