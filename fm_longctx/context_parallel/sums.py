"""A sum over the ranks that share a sequence, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's `part`, the same on all of them, for a loss that each of them computes alike from it.

    A trainer averages the gradients of the ranks' losses, or sums those of their *shares*, 1 / size of the loss each. A
    rank's part enters the loss of every rank, so its gradient is the sum of size equal terms: what comes back is
    multiplied by the size, and nothing is sent.

    Args:
        part: any shape, the same on every rank.
        group: None is one rank.
    """
    if group is None or dist.get_world_size(group) == 1:
        return part
    total: Tensor = _Sum.apply(part, group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        return d_total * ctx.size, None
