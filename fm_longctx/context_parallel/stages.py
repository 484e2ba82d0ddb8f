"""What one rank does with one batch: its rows, and per stage what it sends, receives and attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fm_longctx.mask.flash_mask import FlashMask


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One exchange and the attention to what it brings. Stage 0 exchanges nothing: it is the rank's own keys."""

    mask: FlashMask
    """The rank's rows x this stage's columns, as they arrive."""

    columns: Tensor
    """int64 `[n]`: global positions of the keys, in the order in which they arrive: by source rank, ascending."""

    receive_counts: tuple[int, ...]
    """Keys from each rank; their sum is n, but 0 in stage 0."""

    send_counts: tuple[int, ...]
    """Keys to each rank."""

    send_rows: Tensor
    """int64 `[sum of send_counts]`: which of the rank's own keys (local positions), destination after destination."""

    def to(self, device: torch.device | str) -> Stage:
        """The same stage with its mask and its indices on a device."""
        return replace(
            self,
            mask=self.mask.to(device),
            columns=self.columns.to(device, non_blocking=True),
            send_rows=self.send_rows.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RankPlan:
    """One rank's part of a `ShardPlan` under one mask: small, picklable, made in a loader's worker."""

    rank: int
    world_size: int

    num_tokens: int
    """N, the length of the whole sequence."""

    rows: Tensor
    """int64 `[T]`: the rank's positions, ascending."""

    stages: tuple[Stage, ...]

    fingerprint: str
    """Of plan and mask; the same on every rank that will work together."""
