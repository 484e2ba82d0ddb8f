"""Which ranks share a sequence, for trainers that know of data parallelism only."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's place: consecutive ranks share a sequence, and ranks of one place in it share the data."""

    group: dist.ProcessGroup | None
    """The ranks that share this rank's sequences; None where each rank has its own."""
    rank: int
    """Place within the group."""
    size: int
    """Ranks in the group."""
    data_rank: int
    """Which of the groups."""
    data_size: int
    """How many groups."""


def context_parallel_ranks(size: int) -> Ranks:
    """Groups of `size` consecutive ranks of the default process group. A collective: every rank calls it.

    Raises:
        ValueError: no process group, or a number of ranks that `size` does not divide.
    """
    if size == 1 and not dist.is_initialized():
        return Ranks(group=None, rank=0, size=1, data_rank=0, data_size=1)
    if not dist.is_initialized():
        raise ValueError(
            f"context_parallel_size={size} needs {size} ranks and torch.distributed is not initialized. Start the "
            f"script with: torchrun --nproc-per-node {size} ..."
        )
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % size:
        raise ValueError(f"context_parallel_size={size} does not divide the {world_size} ranks.")
    group = None
    if size > 1:
        ranks = [list(range(first, first + size)) for first in range(0, world_size, size)]
        # Every rank takes part in making every group, in the same order.
        groups = [dist.new_group(members) for members in ranks]
        group = groups[rank // size]
    return Ranks(group=group, rank=rank % size, size=size, data_rank=rank // size, data_size=world_size // size)
