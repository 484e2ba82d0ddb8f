"""What `peel` and `swap` do, in loops that numba compiles: the same owners, some ten times sooner.

Needs numba, which is optional: without it, and where there is little to do, the vectorised forms run, which also say
why each step is as it is. The first call on a machine compiles for seconds; the result is kept beside this file (or in
numba's cache folder, where that is not writable) and read by later processes.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped,import-not-found,unused-ignore]

from fm_longctx.context_parallel.compiled_swap import swap_chunks
from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.peel import AT_ONCE
from fm_longctx.context_parallel.problem import Problem

__all__ = ["most_needed", "peel_chunks", "swap_chunks"]


def peel_chunks(problem: Problem, cap: float) -> Ints:
    """Owners as `peel` finds them; cap is the load that a rank may have."""
    odd = int(problem.odd.any())
    begins, needs = problem.transposed
    owners = np.full(problem.chunks, -1)
    _peel(
        owners,
        problem.world_size,
        np.array([problem.chunks // problem.world_size - odd, odd]),
        problem.load,
        problem.odd.astype(np.int64),
        problem.reach,
        np.argsort(problem.load, kind="stable"),
        np.argsort(-problem.reach, kind="stable"),
        *(problem.by_row, problem.needs.columns, problem.needs.keys),
        *(begins, needs.rows, needs.keys),
        cap,
        problem.mean_load,
    )
    return owners


@njit(cache=True)
def most_needed(needed: Floats, owners: Ints, rows: Ints, columns: Ints, keys: Floats) -> None:
    """Columns that each rank needs of each chunk, `[ranks, chunks]`, into zeros: those of its most demanding chunk."""
    for e in range(len(rows)):
        rank, column = owners[rows[e]], columns[e]
        needed[rank, column] = max(needed[rank, column], keys[e])


@njit(cache=True)
def _peel(
    owners: Ints,
    ranks: int,
    per_rank: Ints,
    loads: Floats,
    odd: Ints,
    reach: Floats,
    by_load: Ints,
    by_reach: Ints,
    row_begins: Ints,
    columns: Ints,
    keys: Floats,
    column_begins: Ints,
    rows: Ints,
    keys_of_rows: Floats,
    cap: float,
    mean_load: float,
) -> None:
    chunks = len(loads)
    per = per_rank[0] + per_rank[1]
    scale, load_scale = 1.0, max(mean_load, 1.0)
    for chunk in range(chunks):
        scale = max(scale, reach[chunk])
    free = np.zeros(chunks, np.int64)
    needed, extra = np.zeros(chunks), np.zeros(chunks)
    light, badness = np.zeros(per + 1), np.zeros(per)
    chosen, left = np.zeros(per, np.int64), np.zeros(2, np.int64)
    for rank in range(ranks - 1):
        # The free chunks, the lightest first, as they are when the rank begins.
        num_free = 0
        for n in range(chunks):
            if owners[by_load[n]] < 0:
                free[num_free] = by_load[n]
                num_free += 1
            needed[n], extra[n] = 0.0, reach[n]
        load = 0.0
        left[0], left[1] = per_rank[0], per_rank[1]
        step = 0  # 0: the furthest; 1: those that need nothing more; 2: the others
        while left[0] + left[1] > 0:
            room = left[0] + left[1]
            some = 0
            for at in range(num_free):
                chunk = free[at]
                if owners[chunk] < 0:
                    some += 1
                    light[some] = light[some - 1] + loads[chunk]
                    if some == room:
                        break
            count = 0
            if step == 0:
                for n in range(chunks):
                    if owners[by_reach[n]] < 0:
                        chosen[0] = by_reach[n]
                        count = 1
                        break
                step = 1
            elif step == 1:
                count = _gratis(free[:num_free], owners, odd, left, extra, reach, chosen, room)
                fitting = 0
                sum_load = 0.0
                odds = 0
                for n in range(count):
                    chunk = chosen[n]
                    sum_load += loads[chunk]
                    odds += odd[chunk]
                    if not (
                        load + sum_load + light[room - 1 - n] <= cap and odds <= left[1] and 1 + n - odds <= left[0]
                    ):
                        break
                    fitting += 1
                if fitting < count or not fitting:
                    step = 2
                count = fitting
                if not count:
                    continue
            else:
                of_free = free[:num_free], owners, odd, left, loads, extra
                count = _fillers(*of_free, light, chosen, badness, load, cap, mean_load, (scale, load_scale))
            sum_load = 0.0
            for n in range(count):
                chunk = chosen[n]
                owners[chunk] = rank
                sum_load += loads[chunk]
                left[odd[chunk]] -= 1
                for e in range(row_begins[chunk], row_begins[chunk + 1]):
                    _need(columns[e], keys[e], needed, extra, column_begins, rows, keys_of_rows)
                _need(chunk, np.inf, needed, extra, column_begins, rows, keys_of_rows)
            load += sum_load
    for chunk in range(chunks):
        if owners[chunk] < 0:
            owners[chunk] = ranks - 1


@njit(cache=True)
def _need(column: int, count: float, needed: Floats, extra: Floats, begins: Ints, rows: Ints, keys: Floats) -> None:
    before = needed[column]
    if count <= before:
        return
    needed[column] = count
    for e in range(begins[column], begins[column + 1]):
        extra[rows[e]] -= min(keys[e], count) - min(keys[e], before)
    if count < np.inf:
        extra[column] -= count - before


@njit(cache=True)
def _gratis(
    free: Ints, owners: Ints, odd: Ints, left: Ints, extra: Floats, reach: Floats, chosen: Ints, room: int
) -> int:
    """The chunks that need nothing more, by what they need, then the furthest, then the first: `room` at most."""
    count = 0
    for n in range(len(free)):
        chunk = free[n]
        if owners[chunk] >= 0 or extra[chunk] > 0 or left[odd[chunk]] == 0:
            continue
        at = min(count, room)
        while at > 0:
            other = chosen[at - 1]
            if extra[chunk] != extra[other]:
                before = extra[chunk] < extra[other]
            elif reach[chunk] != reach[other]:
                before = reach[chunk] > reach[other]
            else:
                before = chunk < other
            if not before:
                break
            if at < room:
                chosen[at] = other
            at -= 1
        if at < room:
            chosen[at] = chunk
            count = min(count + 1, room)
    return count


@njit(cache=True)
def _fillers(
    free: Ints,
    owners: Ints,
    odd: Ints,
    left: Ints,
    loads: Floats,
    extra: Floats,
    light: Floats,
    chosen: Ints,
    badness: Floats,
    load: float,
    cap: float,
    mean_load: float,
    scales: tuple[float, float],
) -> int:
    """The chunks to fill up with, in the order of `free`: one, or several where there is much room."""
    room = left[0] + left[1]
    share = (mean_load - load) / room
    several = room // AT_ONCE
    wanted = several + 1 if several > 1 else 1
    count = 0
    fits = load + light[room] <= cap
    most = cap - load - light[room - 1]
    lightest = -1
    for n in range(len(free)):
        chunk = free[n]
        if owners[chunk] >= 0 or left[odd[chunk]] == 0:
            continue
        if lightest < 0:
            lightest = chunk
        if not fits or loads[chunk] > most:
            break
        bad = abs(loads[chunk] - share) / scales[1] + extra[chunk] / scales[0]
        at = count
        while at > 0 and bad < badness[at - 1]:
            if at < wanted:
                badness[at], chosen[at] = badness[at - 1], chosen[at - 1]
            at -= 1
        if at < wanted:
            badness[at], chosen[at] = bad, chunk
            count = min(count + 1, wanted)
    if not count:
        chosen[0] = lightest
        return 1
    together = min(several, count - 1)
    if together > 1:
        best = chosen[0]
        # In the order of loads, as of `free`.
        for n in range(1, together):
            chunk, at = chosen[n], n
            while at > 0 and (
                loads[chosen[at - 1]] > loads[chunk]
                or (loads[chosen[at - 1]] == loads[chunk] and chosen[at - 1] > chunk)
            ):
                chosen[at] = chosen[at - 1]
                at -= 1
            chosen[at] = chunk
        odds = 0
        sum_load = 0.0
        for n in range(together):
            odds += odd[chosen[n]]
            sum_load += loads[chosen[n]]
        if load + sum_load + light[room - together] <= cap and odds <= left[1] and together - odds <= left[0]:
            return together
        chosen[0] = best
    return 1
