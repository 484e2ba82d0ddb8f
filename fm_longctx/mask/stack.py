"""Several masks as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fm_longctx.mask.reindex import select

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask


def stack(masks: Sequence[FlashMask]) -> tuple[Tensor, Tensor, bool]:
    """Intervals of a batch that holds the masks one after the other, and whether it is causal.

    Columns of a mask with fewer intervals get empty ones. One mask head stands for as many as another mask has. Where
    some masks are causal and some are not, causality becomes an interval of those that are.

    Args:
        masks: at least one, of one device, each with its own batch (mostly 1).

    Raises:
        ValueError: no mask, or masks that differ in rows, columns, device, or in heads where neither has one.

    Returns:
        starts, ends: int32 `[sum of B, H_mask, largest K, N_k]`, canonical if the masks are. causal.
    """
    if not masks:
        raise ValueError("there is no mask to stack; give at least one.")
    first = masks[0]
    for mask in masks:
        if (mask.num_rows, mask.num_columns, mask.device) != (first.num_rows, first.num_columns, first.device):
            raise ValueError(
                f"masks of one batch must have the same rows, columns and device, got {first.num_rows} x "
                f"{first.num_columns} on {first.device} and {mask.num_rows} x {mask.num_columns} on {mask.device}."
            )
    heads = max(mask.heads for mask in masks)
    for mask in masks:
        if mask.heads not in (1, heads):
            raise ValueError(f"masks of one batch must have as many heads, or one, got {mask.heads} and {heads}.")
    causal = all(mask.causal for mask in masks)
    parts = [(m.starts, m.ends) if m.causal == causal else _not_causal(m) for m in masks]
    most = max(starts.shape[2] for starts, _ in parts)
    return (
        torch.cat([_widened(starts, heads, most, first.num_rows) for starts, _ in parts]),
        torch.cat([_widened(ends, heads, most, first.num_rows) for _, ends in parts]),
        causal,
    )


def _not_causal(mask: FlashMask) -> tuple[Tensor, Tensor]:
    return select(mask, torch.arange(mask.num_rows, device=mask.device))


def _widened(bounds: Tensor, heads: int, intervals: int, num_rows: int) -> Tensor:
    """`[B, heads, intervals, N_k]`; the new intervals are empty, in the canonical way: at the last row."""
    batch, _, used, columns = bounds.shape
    wide = bounds.new_full((batch, heads, intervals, columns), num_rows)
    wide[:, :, :used] = bounds
    return wide
