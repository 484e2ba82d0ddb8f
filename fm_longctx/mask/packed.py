"""Intervals of packed documents, from lengths, cumulative lengths or positions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def from_lengths(lengths: Sequence[int], *, causal: bool) -> tuple[Tensor, Tensor]:
    """starts, ends `[1, 1, K, N]` for documents of these lengths (each >= 0), one after the other."""
    if len(lengths) == 0 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in lengths):
        raise ValueError(f"lengths must be a non-empty sequence of integers >= 0, got {list(lengths)[:8]}.")
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return _from_bounds(torch.cat([ends.new_zeros(1), ends])[None], causal=causal)


def from_cu_seqlens(cu_seqlens: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """starts, ends `[1, 1, K, N]` for cumulative lengths `[documents + 1]`, from 0 to N, non-decreasing."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be a 1-D int32 or int64 tensor of at least two entries, got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}."
        )
    bounds = cu_seqlens.long()
    if int(bounds[0]) != 0 or bool((bounds[1:] < bounds[:-1]).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds[:8].tolist()}...")
    return _from_bounds(bounds[None], causal=causal)


def from_position_ids(position_ids: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """starts, ends `[B, 1, K, N]` for positions `[N]` or `[B, N]` that restart with each document."""
    if position_ids.ndim not in (1, 2) or position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"position_ids must be an int32 or int64 tensor [N] or [B, N], got {position_ids.dtype} "
            f"{list(position_ids.shape)}."
        )
    positions = position_ids.long()[None] if position_ids.ndim == 1 else position_ids.long()
    b, n = positions.shape
    begins = torch.ones((b, n + 1), dtype=torch.bool, device=positions.device)
    begins[:, 1:n] = positions[:, 1:] != positions[:, :-1] + 1
    index = torch.arange(n + 1, device=positions.device).expand(b, -1)
    start = torch.where(begins, index, 0).cummax(dim=1).values[:, :n]
    # The next document's start: the nearest True at or after j + 1.
    end = torch.where(begins, index, n).flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    return _from_documents(start, end, causal=causal)


def _from_bounds(bounds: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    n = int(bounds[0, -1])
    columns = torch.arange(n, device=bounds.device)
    document = torch.searchsorted(bounds[0], columns, right=True)
    return _from_documents(bounds[:, document - 1], bounds[:, document], causal=causal)


def _from_documents(start: Tensor, end: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """start, end int64 `[B, N]`: the document of each column. Masked below it, and above it unless causal does that."""
    n = torch.full_like(end, end.shape[-1])
    pairs = [(end, n)] if causal else [(torch.zeros_like(start), start), (end, n)]
    starts = torch.stack([s for s, _ in pairs], dim=1)
    ends = torch.stack([e for _, e in pairs], dim=1)
    return starts[:, None].int(), ends[:, None].int()
