"""A rank's part of a plan: what it exchanges in each stage and the masks that it attends under."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fm_longctx.context_parallel.coverage import Ints, covered, seen_areas, seen_columns, seen_ranges, segments
from fm_longctx.context_parallel.stages import Stage
from fm_longctx.mask.flash_mask import FlashMask


def stage_of(source: int, destination: int, world_size: int, num_stages: int) -> int:
    """The stage in which one rank's keys travel to another's; 0 to itself.

    Pairs are told apart by (destination - source) modulo the ranks: in 2 stages all travel at once, in as many stages
    as ranks one neighbour after the other, as in a ring.
    """
    hops = (destination - source) % world_size
    return 0 if hops == 0 else 1 + (hops - 1) * (num_stages - 1) // (world_size - 1)


def rank_stages(
    mask: FlashMask, bounds: Ints, owners: Ints, rank: int, world_size: int, num_stages: int
) -> tuple[Ints, tuple[Stage, ...]]:
    """A rank's rows, ascending, and its stages under one mask. bounds and owners as in `ShardPlan`."""
    sources = np.repeat(owners, np.diff(bounds))
    parts = segments(mask).cut(bounds)
    rows_of = _positions_by_rank(np.arange(len(sources)), sources, world_size)
    rows = rows_of[rank]
    seen = np.flatnonzero(seen_columns(parts, rows))
    needed = _positions_by_rank(seen, sources[seen], world_size)
    # The others' needs of this rank's columns, in its local positions: an owned segment stays in one piece.
    own = parts.take(sources[parts.first] == rank)
    local = np.searchsorted(rows, own.first)
    wanted = []
    for other in range(world_size):
        first, stop = seen_ranges(own, rows_of[other])
        wanted.append(np.flatnonzero(covered(local, local + stop - first, len(rows))))
    none = np.zeros(0, dtype=np.int64)
    stages = []
    for s in range(num_stages):
        meets = [r != rank and stage_of(r, rank, world_size, num_stages) == s for r in range(world_size)]
        gets = [r != rank and stage_of(rank, r, world_size, num_stages) == s for r in range(world_size)]
        received = [needed[r] if meets[r] else none for r in range(world_size)]
        sent = [wanted[r] if gets[r] else none for r in range(world_size)]
        columns = np.concatenate(received) if s else rows
        stages.append(_stage(mask, rows, columns, received, sent))
    return rows, tuple(stages)


def _stage(mask: FlashMask, rows: Ints, columns: Ints, received: Sequence[Ints], sent: Sequence[Ints]) -> Stage:
    local = mask.select(torch.from_numpy(rows), torch.from_numpy(columns))
    return Stage(
        mask=local,
        area=int(local.area().sum()),
        columns=torch.from_numpy(columns),
        receive_counts=tuple(len(r) for r in received),
        send_counts=tuple(len(s) for s in sent),
        send_rows=torch.from_numpy(np.concatenate(sent)),
    )


def _positions_by_rank(positions: Ints, ranks: Ints, world_size: int) -> list[Ints]:
    """The positions of each rank, in their order."""
    # A radix sort, for the narrow type.
    order = np.argsort(ranks.astype(np.uint16), kind="stable")
    return np.split(positions[order], np.bincount(ranks, minlength=world_size).cumsum()[:-1])


def exchange_tables(mask: FlashMask, bounds: Ints, owners: Ints, world_size: int) -> tuple[Ints, Ints]:
    """int64 `[ranks, ranks]` each, [r, c]: scores of rank r's rows in rank c's columns, and how many of those columns
    rank r sees (r receives them from c, but for its own)."""
    sources = np.repeat(owners, np.diff(bounds))
    parts = segments(mask).cut(bounds)
    source = sources[parts.first]
    areas = np.zeros((world_size, world_size), dtype=np.int64)
    keys = np.zeros_like(areas)
    for rank, rows in enumerate(_positions_by_rank(np.arange(len(sources)), sources, world_size)):
        # Integers above 2^53 would lose their last digits in bincount's float64.
        np.add.at(areas[rank], source, seen_areas(parts, rows))
        first, stop = seen_ranges(parts, rows)
        if parts.num_entries == 1:
            keys[rank] = np.bincount(source, stop - first, world_size)
        else:
            keys[rank] = np.bincount(sources[covered(first, stop, parts.num_tokens)], minlength=world_size)
    return areas, keys
