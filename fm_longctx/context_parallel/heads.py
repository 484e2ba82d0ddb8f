"""Trading rows for heads inside a ring, and back: head parallelism as in DeepSpeed-Ulysses (arXiv 2309.14509).

A ring's u members hold a run of its rows each, with all heads. One all-to-all gives each member all of the ring's rows
with its part of the heads, another gives the rows back. Where there are fewer key/value heads than members, several
members get the same one, and its gradients are added over them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx.context_parallel.context import ContextParallel
from fm_longctx.context_parallel.exchange import Pending


def check_heads(heads: int, kv_heads: int, members: int) -> None:
    """Raise a ValueError unless a ring of so many members can split these heads."""
    if heads % members:
        raise ValueError(
            f"head_parallel={members} must divide the {heads} query heads. Build the plan with a divisor of both the "
            "ranks and the query heads."
        )
    if kv_heads % members and members % kv_heads:
        raise ValueError(
            f"head_parallel={members} must divide the {kv_heads} key/value heads, or be a multiple of them (each is "
            "then held by several ranks)."
        )


def to_heads(x: Tensor, context: ContextParallel) -> Tensor:
    """`[B, T, H, D]`, its rows of all heads, to `[B, rows, max(1, H / u), D]`, the ring's rows of its heads."""
    out: Tensor = _ToHeads.apply(x, context)
    return out


def to_rows(x: Tensor, context: ContextParallel) -> Tensor:
    """The inverse of `to_heads`, for query heads: `[B, ring's rows, H / u, D]` to `[B, T, H, D]`."""
    out: Tensor = _ToRows.apply(x, context)
    return out


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context, ctx.heads = context, x.shape[2]
        return _gather_rows(x, context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather_heads(grad, ctx.context, ctx.heads), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        return _gather_heads(x, context, x.shape[2] * context.members)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather_rows(grad, ctx.context), None


def _gather_rows(x: Tensor, context: ContextParallel) -> Tensor:
    members, rows = context.members, x.shape[1]
    received = _trade(by_member(x, members), [rows] * members, list(context.member_counts), context)
    return received.transpose(0, 1).contiguous()


def _gather_heads(x: Tensor, context: ContextParallel, heads: int) -> Tensor:
    members, rows = context.members, len(context.rows)
    counts = context.member_counts
    received = _trade(x.transpose(0, 1).contiguous(), list(counts), [rows] * members, context)
    return with_all_heads(received, members, heads)


def by_member(x: Tensor, members: int) -> Tensor:
    """`[B, T, H, D]` to `[u T, B, heads of a member, D]`: what goes to each member, one after the other."""
    if x.shape[2] >= members:
        parts = x.unflatten(2, (members, -1)).permute(2, 1, 0, 3, 4)
    else:
        repeats = members // x.shape[2]
        parts = x.permute(2, 1, 0, 3).repeat_interleave(repeats, dim=0).unsqueeze(3)
    return parts.flatten(0, 1).contiguous()


def with_all_heads(received: Tensor, members: int, heads: int) -> Tensor:
    """`[u T, B, heads of a member, D]`, of one member after the other, to `[B, T, H, D]`."""
    parts = received.unflatten(0, (members, -1))  # [u, T, B, heads of a member, D]
    if heads >= members:
        return parts.permute(2, 1, 0, 3, 4).flatten(2, 3)
    # Gradients of a key/value head that several members attended with: added in their order, in float32 at least.
    exact = torch.promote_types(received.dtype, torch.float32)
    total = parts.unflatten(0, (heads, -1)).to(exact).sum(1)  # [heads, T, B, 1, D]
    return total.to(received.dtype).squeeze(3).permute(2, 1, 0, 3)


def _trade(x: Tensor, send: list[int], receive: list[int], context: ContextParallel) -> Tensor:
    """An all-to-all between the members of this rank's ring, over the whole group: the others have nothing to send."""
    first = context.rank - context.rank % context.members
    group = context.group
    assert isinstance(group, dist.ProcessGroup)

    def spread(counts: list[int]) -> list[int]:
        return [0] * first + counts + [0] * (context.world_size - first - len(counts))

    return Pending(x, spread(send), spread(receive), group).wait()
