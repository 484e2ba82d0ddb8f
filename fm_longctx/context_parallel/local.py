"""A rank's part of a plan: what it exchanges in each stage and the masks that it attends under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fm_longctx.context_parallel.coverage import (
    Ints,
    covered,
    seen_areas,
    seen_columns,
    seen_ranges,
    segments,
)
from fm_longctx.context_parallel.stages import Stage
from fm_longctx.mask.flash_mask import FlashMask

# A pair's keys are cut into stages of whole tiles, and not of fewer on average: for a part of its columns a tile takes
# a kernel as long.
_TILE = 128


class Staging(NamedTuple):
    """How the keys that travel are cut into stages."""

    num_stages: int
    """With stage 0, which exchanges nothing."""
    growth: float
    """How many times the share of the exchange before it each exchange has."""
    own_stage: int
    """The stage in which a rank's own keys are attended to: 0, while the first keys travel, or 1, with those."""


def stage_slice(keys: Ints, hops: Ints, stage: Ints, world_size: int, staging: Staging) -> tuple[Ints, Ints]:
    """Which of the keys that one rank sends another travel in a stage: those from `begin` to `end`, in their order.

    Every pair's keys are cut by the same shares, in whole tiles, so that whatever a rank sends or receives in all, each
    of its stages has its share of the bytes. Pairs of few keys travel in one stage, spread over the stages by their
    hops. With as many stages as ranks (more than two) it is a ring instead: one neighbour after the other.

    Args:
        keys, hops: of each pair, how many keys, and (destination - source) modulo the ranks; at least 1 hop.
        stage: 1..num_stages - 1; the three are broadcast.
    """
    num_stages, growth, _ = staging
    if num_stages == world_size:
        return np.zeros_like(keys), np.where(hops == stage, keys, 0)
    shares = np.power(float(growth), np.arange(num_stages - 1)).cumsum()
    ends = np.concatenate([np.zeros(1), shares[:-1] / shares[-1], np.ones(1)])
    low, high = ends[stage - 1], ends[stage]
    at = (hops - 0.5) / (world_size - 1)
    whole = np.where((low < at) & (at <= high), keys, 0)
    cut = keys >= _TILE * (num_stages - 1)
    tiles = np.floor(keys / _TILE)
    begin = (np.floor(tiles * low) * _TILE).astype(np.int64)
    end = np.where(high < 1, np.floor(tiles * high) * _TILE, keys).astype(np.int64)
    return np.where(cut, begin, 0), np.where(cut, end, whole)


def rank_stages(
    mask: FlashMask, bounds: Ints, owners: Ints, rank: int, world_size: int, staging: Staging
) -> tuple[Ints, tuple[Stage, ...]]:
    """A rank's rows, ascending, and its stages under one mask. bounds and owners as in `ShardPlan`."""
    sources = np.repeat(owners, np.diff(bounds))
    parts = segments(mask).cut(bounds)
    rows_of = rows_by_rank(bounds, owners, world_size)
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
    others = np.arange(world_size)
    own_first = staging.own_stage == 0 or world_size == 1
    stages = [_stage(mask if own_first else _hidden(mask), rows, rows, [0] * world_size, [], [0] * world_size)]
    for s in range(1, staging.num_stages):
        counts = np.array([len(r) if i != rank else 0 for i, r in enumerate(needed)])
        received = _cut(needed, *stage_slice(counts, (rank - others) % world_size, np.array(s), world_size, staging))
        counts = np.array([len(r) if i != rank else 0 for i, r in enumerate(wanted)])
        sent = _cut(wanted, *stage_slice(counts, (others - rank) % world_size, np.array(s), world_size, staging))
        if s == staging.own_stage:
            # To itself: then one pass of attention has them all, in one piece of memory.
            received[rank], sent[rank] = needed[rank], wanted[rank]
        columns = np.concatenate(received)
        stages.append(_stage(mask, rows, columns, [len(r) for r in received], sent, [len(r) for r in sent]))
    return rows, tuple(stages)


def _hidden(mask: FlashMask) -> FlashMask:
    """A mask of the same size that shows nothing."""
    shape = (mask.batch, mask.heads, 1, mask.num_columns)
    return FlashMask.from_canonical(
        torch.zeros(shape, dtype=mask.starts.dtype),
        torch.full(shape, mask.num_rows, dtype=mask.starts.dtype),
        causal=False,
        num_rows=mask.num_rows,
    )


def _cut(positions: Sequence[Ints], begins: Ints, ends: Ints) -> list[Ints]:
    return [p[begin:end] for p, begin, end in zip(positions, begins.tolist(), ends.tolist(), strict=True)]


def _stage(
    mask: FlashMask,
    rows: Ints,
    columns: Ints,
    receive_counts: Sequence[int],
    sent: Sequence[Ints],
    send_counts: Sequence[int],
) -> Stage:
    local = mask.select(torch.from_numpy(rows), torch.from_numpy(columns))
    send_rows = np.concatenate([np.zeros(0, dtype=np.int64), *sent])
    order = np.argsort(send_rows, kind="stable")
    return Stage(
        mask=local,
        area=int(local.area().sum()),
        columns=torch.from_numpy(columns),
        receive_counts=tuple(receive_counts),
        send_counts=tuple(send_counts),
        send_rows=torch.from_numpy(send_rows),
        return_rows=torch.from_numpy(send_rows[order]),
        return_order=torch.from_numpy(order),
    )


def rows_by_rank(bounds: Ints, owners: Ints, world_size: int) -> list[Ints]:
    """The positions of each rank, ascending."""
    order, sizes = np.argsort(owners, kind="stable"), np.diff(bounds)
    sizes = sizes[order]
    rows = np.arange(bounds[-1]) + np.repeat(bounds[:-1][order] - (sizes.cumsum() - sizes), sizes)
    return np.split(rows, np.bincount(owners, np.diff(bounds), world_size).astype(np.int64).cumsum()[:-1])


def _positions_by_rank(positions: Ints, ranks: Ints, world_size: int) -> list[Ints]:
    """The positions of each rank, in their order."""
    # A radix sort, for the narrow type.
    order = np.argsort(ranks.astype(np.uint16), kind="stable")
    return np.split(positions[order], np.bincount(ranks, minlength=world_size).cumsum()[:-1])


def exchange_tables(mask: FlashMask, bounds: Ints, owners: Ints, world_size: int) -> tuple[Ints, Ints]:
    """int64 `[ranks, ranks]` each, [r, c]: scores of rank r's rows in rank c's columns, and `exchanged_keys`."""
    parts = segments(mask).cut(bounds)
    source = np.repeat(owners, np.diff(bounds))[parts.first]
    areas = np.zeros((world_size, world_size), dtype=np.int64)
    for rank, rows in enumerate(rows_by_rank(bounds, owners, world_size)):
        # Integers above 2^53 would lose their last digits in bincount's float64.
        np.add.at(areas[rank], source, seen_areas(parts, rows))
    return areas, exchanged_keys(mask, bounds, owners, world_size)


def exchanged_keys(mask: FlashMask, bounds: Ints, owners: Ints, world_size: int) -> Ints:
    """int64 `[ranks, ranks]`, [r, c]: of rank c's columns those that rank r sees; it receives them, but for its own."""
    sources = np.repeat(owners, np.diff(bounds))
    parts = segments(mask).cut(bounds)
    source = sources[parts.first]
    keys = np.zeros((world_size, world_size), dtype=np.int64)
    for rank, rows in enumerate(rows_by_rank(bounds, owners, world_size)):
        first, stop = seen_ranges(parts, rows)
        if parts.num_entries == 1:
            keys[rank] = np.bincount(source, stop - first, world_size)
        else:
            keys[rank] = np.bincount(sources[covered(first, stop, parts.num_tokens)], minlength=world_size)
    return keys
