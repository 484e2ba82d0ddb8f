"""Choosing chunks and their owners."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fm_longctx.context_parallel.assign import STRATEGIES, balanced, contiguous, zigzag
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.coverage import (
    Floats,
    Ints,
    Needs,
    Segments,
    chunk_areas,
    chunk_needs,
    longest_lists,
    row_area,
    seen_by,
    segments,
    tile_work,
)
from fm_longctx.context_parallel.place import place
from fm_longctx.context_parallel.problem import TOLERANCE, Bools, Problem
from fm_longctx.mask.flash_mask import FlashMask

# The kernels' blocks of rows and columns; chunks are whole ones where a rank has enough positions.
_TILE = 128
# Chunks a rank has if not told otherwise, and how many a rank and in all there may be where that is too few to balance.
_CHUNKS_A_RANK = 16
_MOST_A_RANK = 32
# A chunk with more than this share of a rank's load leaves too little room beside it.
_HEAVIEST = 0.75
_MOST_CHUNKS = 1024
# Beyond so many ranks a plan that balances well takes longer than a step: see docs/context_parallel.md.
_MANY_RANKS = 512
# Slices that cost at most so many times what chunks cost are taken if they are as even.
_AS_GOOD = 1.01


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Chunks and their owners, with what was known of them when they were chosen."""

    world_size: int
    bounds: Ints
    owners: Ints
    areas: Ints
    """`[ranks]`: unmasked scores, summed over masks times weights, batch and heads."""
    problem: Problem
    assigned: Ints
    """`[problem.chunks]`: the owners before neighbours of one rank were joined."""
    keys: Ints
    """`[ranks, ranks]`, [destination, source]: keys that travel, as far as the problem tells."""
    longest: Floats
    """`[2, ranks]`: rows that see the column that most rows of a rank see, of its own and of others', mean over masks.
    """
    entries: float
    """Batch entries whose keys travel for each position, mean over masks."""


def choose_layout(
    masks: Sequence[FlashMask],
    parts: Sequence[Segments],
    weights: Sequence[int],
    world_size: int,
    strategy: str,
    chunk_size: int | None,
    cost: CostModel,
    a_host: int,
) -> Layout:
    """The layout of a strategy for the weighted sum of the masks. Arguments as in `ShardPlan.build`.

    Args:
        parts: the masks' segments.
        world_size: what shares the positions: ranks, or rings of ranks.
        a_host: how many of these are on a host.
    """
    check_strategy(strategy, chunk_size)
    n = masks[0].num_rows

    def pose(chunk_size: int) -> tuple[Ints, Ints, Problem]:
        return _pose(masks, parts, weights, world_size, *chunk_grid(n, world_size, chunk_size), cost, a_host)

    if strategy == "balanced":
        size = chunk_size or _chunk_size(n, world_size)
        bounds, areas, problem = pose(size)
        # A mask with a few heavy rows asks for smaller chunks.
        most = max(_MOST_CHUNKS, _MOST_A_RANK * world_size)

        def may_halve() -> bool:
            return chunk_size is None and n < size * most and size > 1

        while may_halve() and problem.load.max(initial=0.0) > _HEAVIEST * problem.mean_load:
            size //= 2
            bounds, areas, problem = pose(size)
        best = balanced(problem)
        while may_halve() and best.imbalance > 1 + 2 * TOLERANCE:
            size //= 2
            finer = pose(size)
            other = balanced(finer[2])
            if other.cost < best.cost:
                (bounds, areas, problem), best = finer, other
        for plain in (contiguous, zigzag) if chunk_size is None else ():
            cuts, owners = _sliced(n, world_size, plain, size)
            if not np.isin(cuts, bounds).all():
                # Slices that the chunks cannot form: of what costs as much the more even one.
                posed = _pose(masks, parts, weights, world_size, cuts, np.zeros(len(owners), dtype=bool), cost, a_host)
                other = posed[2].measure(owners)
                as_even = other.imbalance <= best.imbalance and other.cost <= _AS_GOOD * best.cost
                if as_even or other.cost < best.cost:
                    (bounds, areas, problem), best = posed, other
        assigned = best.owners
        keys = _exchanged(problem, assigned)
        number = place(keys, a_host)
        assigned = number[assigned]
        keys[np.ix_(number, number)] = keys.copy()
    else:
        cuts, assigned = _sliced(n, world_size, contiguous if strategy == "contiguous" else zigzag)
        odd = np.zeros(len(assigned), dtype=bool)
        bounds, areas, problem = _pose(masks, parts, weights, world_size, cuts, odd, cost, a_host)
        keys = _exchanged(problem, assigned)
    lists = [longest_lists(part, bounds, assigned, world_size) for part in parts]
    changes = np.flatnonzero(np.diff(assigned, prepend=-1))
    return Layout(
        world_size=world_size,
        bounds=np.append(bounds[changes], n),
        owners=assigned[changes],
        areas=_sums(assigned, areas, world_size),
        problem=problem,
        assigned=assigned,
        keys=keys,
        longest=np.average(lists, axis=0, weights=weights),
        entries=float(np.average([mask.batch for mask in masks], weights=weights)),
    )


def received_floor(masks: Sequence[FlashMask], weights: Sequence[int], world_size: int, tolerance: float) -> float:
    """Keys that any layout must receive whose area is even to the tolerance, over an all-gather's: a lower bound.

    The rows that see a column have together an area that takes at least so many ranks, and are so many that they take
    at least so many shares; one of these ranks may own the column, the others receive it. Counted for each column and
    by scores, whatever chunks a layout has; with several batch entries or heads for the one that asks for most.
    """
    n, total = masks[0].num_rows, 0.0
    share = -(-n // world_size)
    if world_size == 1 or n <= 1:
        return 0.0
    rows_area = np.zeros(n, dtype=np.int64)
    for mask, weight in zip(masks, weights, strict=True):
        rows_area += weight * row_area(segments(mask))
    mean = float(rows_area.sum()) / world_size
    summed = np.concatenate([np.zeros(1), rows_area.cumsum()])
    for mask, weight in zip(masks, weights, strict=True):
        most = np.zeros(n)
        parts = segments(mask)
        for entry in range(parts.num_entries):
            rows, area = seen_by(parts.take(parts.entry == entry), summed)
            needed = np.ceil(np.maximum(area / (mean * (1 + tolerance)) if mean else 0 * area, rows / share) - 1e-9)
            most = np.maximum(most, needed - 1)
        total += weight * np.maximum(most, 0).sum()
    return float(total / sum(weights) / (n * (world_size - 1)))


def chunk_grid(n: int, world_size: int, chunk_size: int) -> tuple[Ints, Bools]:
    """Chunks of n positions that ranks can share equally: bounds int64 `[chunks + 1]`, and which chunks are odd.

    A rank's floor(n / world_size) positions are chunks of `chunk_size` and one odd chunk with the rest, of half to one
    and a half chunks; the first n % world_size odd chunks have one position more. The odd ones lie evenly between the
    others. Any choice of one odd chunk and equally many others gives a rank floor or ceil of n / world_size positions.

    >>> chunk_grid(11, 2, 2)
    (array([ 0,  2,  4,  6,  8, 10, 11]), array([False, False,  True, False, False,  True]))
    """
    share, longer = divmod(n, world_size)
    chunk_size = min(chunk_size, max(share, 1))
    whole = max(0, (2 * share + chunk_size) // (2 * chunk_size) - 1)
    sizes = np.full((world_size, whole + 1), chunk_size)
    sizes[:, whole] = share - whole * chunk_size
    sizes[:longer, whole] += 1
    odd = np.zeros(sizes.shape, dtype=bool)
    odd[:, whole] = sizes[:, whole].max() != chunk_size or longer > 0
    flat, is_odd = sizes.ravel(), odd.ravel()
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), flat[flat > 0].cumsum()])
    return bounds, is_odd[flat > 0]


def _sliced(
    n: int, world_size: int, plain: Callable[[int, int], Ints], chunk_size: int | None = None
) -> tuple[Ints, Ints]:
    """Chunks of one or two slices a rank, cut at multiples of the chunk size as well: bounds and owners."""
    share = max(1, n // world_size)
    bounds, _ = chunk_grid(n, world_size, share if plain is contiguous else max(1, share // 2))
    owners = plain(len(bounds) - 1, world_size)
    if chunk_size is None:
        return bounds, owners
    cuts = np.union1d(bounds, np.arange(0, n, chunk_size))
    return cuts, owners[np.searchsorted(bounds, cuts[:-1], side="right") - 1]


def _pose(
    masks: Sequence[FlashMask],
    parts: Sequence[Segments],
    weights: Sequence[int],
    world_size: int,
    bounds: Ints,
    odd: Bools,
    cost: CostModel,
    a_host: int,
) -> tuple[Ints, Ints, Problem]:
    """Bounds, areas of the chunks, and the problem of sharing them out."""
    areas = np.zeros(len(bounds) - 1, dtype=np.int64)
    # In chunks smaller than a tile the kernel's blocks say nothing about the rows.
    loads = np.zeros((2 if np.diff(bounds).max(initial=0) >= _TILE else 1, len(bounds) - 1))
    for mask, part, weight in zip(masks, parts, weights, strict=True):
        area, share = chunk_areas(part, bounds), weight / sum(weights) / mask.heads
        areas += weight * area
        loads[0] += area * share
        if len(loads) > 1:
            loads[1] += tile_work(part, bounds, _TILE) * share
    problem = Problem(
        world_size=world_size,
        sizes=np.diff(bounds),
        odd=odd,
        loads=loads,
        needs=_together([chunk_needs(part, bounds) for part in parts], weights, len(bounds) - 1),
        cost=cost,
        a_host=a_host,
    )
    return bounds, areas, problem


def _exchanged(problem: Problem, owners: Ints) -> Ints:
    """Keys of each pair of ranks that travel, `[destination, source]`."""
    ranks = problem.world_size
    rows = [np.bincount(owners, of_chunks, ranks) for of_chunks in problem.received(owners)]
    return np.stack(rows).round().astype(np.int64)


def _together(needs: Sequence[Needs], weights: Sequence[int], chunks: int) -> Needs:
    """The weighted mean of what several masks need."""
    if len(needs) == 1:
        return needs[0]
    cell = np.concatenate([n.rows * chunks + n.columns for n in needs])
    keys = np.concatenate([n.keys * (w / sum(weights)) for n, w in zip(needs, weights, strict=True)])
    cells, where = np.unique(cell, return_inverse=True)
    rows, columns = np.divmod(cells, max(chunks, 1))
    return Needs(rows, columns, np.bincount(where, keys, len(cells)).astype(np.float64))


def _chunk_size(n: int, world_size: int) -> int:
    """So many chunks a rank as balance well and can be searched; in whole tiles where they are that large."""
    fewest = 8 if world_size <= _MANY_RANKS else 2
    per_rank = min(_CHUNKS_A_RANK, max(fewest, _MOST_CHUNKS // world_size))
    size = n // (world_size * per_rank)
    return size // _TILE * _TILE if size >= _TILE else max(1, size)


def _sums(owners: Ints, values: Ints, world_size: int) -> Ints:
    """Sum of each rank's values, in integers: bincount's float64 would lose digits above 2^53."""
    sums = np.zeros(world_size, dtype=np.int64)
    np.add.at(sums, owners, values)
    return sums


def check_strategy(strategy: str, chunk_size: int | None) -> None:
    if strategy not in STRATEGIES:
        nearest = difflib.get_close_matches(str(strategy), STRATEGIES, n=1, cutoff=0.0)[0]
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}. Did you mean {nearest!r}?")
    if strategy != "balanced" and chunk_size is not None:
        raise ValueError(
            f"chunk_size={chunk_size} is for strategy 'balanced'; {strategy!r} has slices of its own. Leave one out."
        )
