"""Bringing a column's intervals to their one canonical form."""

import torch
from torch import Tensor


def diagonal(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """First row that may see each column under causality, int32 `[N_k]`.

    Causality is aligned bottom-right: column j is hidden from rows `[0, j - (N_k - N_q))`.
    """
    columns = torch.arange(num_columns, dtype=torch.int32, device=device)
    return (columns - (num_columns - num_rows)).clamp_(0, num_rows)


def canonicalize(starts: Tensor, ends: Tensor, *, causal: bool, num_rows: int) -> tuple[Tensor, Tensor]:
    """Clip, sort and merge intervals; drop the empty ones.

    Args:
        starts, ends: int32 `[B, H_mask, K, N_k]`, any values; `[start, end)` with start >= end is empty.
        causal: clip to the rows on or below the diagonal.
        num_rows: N_q, the upper clip.

    Returns:
        starts, ends: int32 `[B, H_mask, K', N_k]`, contiguous. Per column sorted by start, disjoint and not
        touching; unused slots come last and hold `start = end = num_rows`. K' is the most that any column uses.
    """
    starts = starts.clamp(0, num_rows)
    if causal:
        starts = torch.maximum(starts, diagonal(num_rows, starts.shape[-1], starts.device))
    ends = ends.clamp(0, num_rows)

    empty = starts >= ends
    starts = starts.masked_fill(empty, num_rows)
    ends = ends.masked_fill(empty, num_rows)
    if starts.shape[2] > 1:
        starts, order = starts.sort(dim=2)
        ends = ends.gather(2, order)
        # An interval opens a new run of masked rows iff it starts beyond everything before it.
        reach = ends.cummax(dim=2).values
        opens = torch.ones_like(starts, dtype=torch.bool)
        opens[:, :, 1:] = starts[:, :, 1:] > reach[:, :, :-1]
        slot = opens.cumsum(dim=2) - 1
        blank = torch.full_like(starts, num_rows)
        starts = blank.scatter_reduce(2, slot, starts, "amin")
        # Slots that no run reached keep num_rows: start = end, so empty.
        ends = torch.zeros_like(ends).scatter_reduce(2, slot, reach, "amax")
        ends = torch.where(starts == num_rows, num_rows, ends)

    used = int((starts < ends).sum(dim=2).max()) if starts.numel() else 0
    return starts[:, :, :used].contiguous(), ends[:, :, :used].contiguous()
