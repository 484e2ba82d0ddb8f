"""Megatron's own sharding: each rank holds one chunk from the front and its mirror image from the back."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag_owners(bounds: Tensor, world_size: int) -> Tensor:
    """The rank of every position when each part of the sequence is sharded zigzag on its own.

    Args:
        bounds: integers `[parts + 1]` on the CPU, from 0 to N, non-decreasing. `[0, N]` is Megatron's sharding of a
            plain batch (`get_batch_on_this_cp_rank`); a thd batch has its documents' bounds
            (`get_thd_batch_on_this_cp_rank`).
        world_size: ranks.

    Returns:
        int64 `[N]`.

    Raises:
        ValueError: a part whose length 2 x world_size does not divide.

    >>> zigzag_owners(torch.tensor([0, 8, 12]), 2).tolist()
    [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    """
    lengths = bounds.long().diff()
    if world_size == 1:
        return torch.zeros(int(lengths.sum()), dtype=torch.int64)
    chunks = 2 * world_size
    odd = (lengths % chunks).nonzero()[:, 0]
    if len(odd):
        i = int(odd[0])
        what = (
            "the sequence" if len(lengths) == 1 else f"document {i}, positions {int(bounds[i])}..{int(bounds[i + 1])},"
        )
        raise ValueError(
            f"Megatron's zigzag sharding cuts {what} into 2 x {world_size} equal chunks, which its length "
            f'{int(lengths[i])} does not allow. Pad it to a multiple of {chunks}, or use sharding="plan", which takes '
            "any length."
        )
    there = torch.arange(world_size)
    ranks = torch.cat([there, there.flip(0)]).repeat(len(lengths))
    return ranks.repeat_interleave((lengths // chunks).repeat_interleave(chunks))
