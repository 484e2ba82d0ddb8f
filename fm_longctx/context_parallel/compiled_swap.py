"""What `swap` does, in loops that numba compiles: see `compiled`."""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-untyped,import-not-found,unused-ignore]

from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.problem import Bools, Problem
from fm_longctx.context_parallel.swap import SENDS, TRIES


def swap_chunks(problem: Problem, owners: Ints, members: Ints, values: Floats, above: Floats, rounds: int) -> Ints:
    """Owners as `swap` betters them, in so many rounds at most; the others as `swap` keeps them."""
    better = owners.copy()
    entries = problem.by_row, problem.needs.columns, problem.needs.keys
    # One layout in memory is one compilation.
    values, above = (np.array(x, order="C") for x in (values, above))
    _swap(better, members.copy(), values, above, problem.odd.astype(np.int64), problem.reach, *entries, rounds)
    return better


@njit(cache=True)
def _swap(
    owners: Ints,
    members: Ints,
    values: Floats,
    above: Floats,
    odd: Ints,
    reach: Floats,
    begins: Ints,
    columns: Ints,
    keys: Floats,
    rounds: int,
) -> None:
    ranks, per = members.shape
    chunks = len(owners)
    limits = len(values)
    most, second = np.zeros((ranks, chunks)), np.zeros((ranks, chunks))
    received, leaving, demand = np.zeros(ranks), np.zeros(chunks), np.zeros(chunks)
    joining, joined, most_bonus = np.zeros(chunks), np.zeros((per, ranks)), np.zeros(ranks)
    gains, bonuses = np.zeros(TRIES), np.zeros(TRIES)
    firsts, seconds = np.zeros(TRIES, np.int64), np.zeros(TRIES, np.int64)
    row = np.zeros(chunks)
    stuck = np.zeros(ranks, np.bool_)
    for rank in range(ranks):
        _count(rank, members[rank], owners, begins, columns, keys, most[rank], second[rank], received, leaving, demand)
    _send(owners, demand, values[limits - 1], above[limits - 1])
    last_i, last_j = -1, -1
    for _ in range(rounds):
        rank = _neediest(above, received, stuck)
        if rank < 0:
            break
        stuck[rank] = True
        _joining(rank, owners, most[rank], reach, begins, columns, keys, joining)
        for n in range(per):
            i = members[rank, n]
            for other in range(ranks):
                total = reach[i] - most[other, i]
                for e in range(begins[i], begins[i + 1]):
                    column = columns[e]
                    total -= keys[e] if owners[column] == other else min(keys[e], most[other, column])
                joined[n, other] = total
        for other in range(ranks):
            most_bonus[other] = 0.0
            for m in range(limits):
                most_bonus[other] += max(above[m, rank], 0.0) + max(above[m, other], 0.0)
        count = 0
        for n in range(per):
            i = members[rank, n]
            for j in range(chunks):
                other = owners[j]
                if other == rank or odd[i] != odd[j]:
                    continue
                saved = (leaving[i] - joined[n, other]) + (leaving[j] - joining[j])
                if saved + most_bonus[other] <= (gains[TRIES - 1] if count == TRIES else 0.0):
                    continue
                bonus = 0.0
                for m in range(limits):
                    shift = values[m, i] - values[m, j]
                    after = max(above[m, rank] - shift, 0.0) + max(above[m, other] + shift, 0.0)
                    bonus += (max(above[m, rank], 0.0) + max(above[m, other], 0.0)) - after
                gain = saved + bonus
                if gain <= 0 or (count == TRIES and gain <= gains[count - 1]):
                    continue
                at = min(count, TRIES - 1)
                while at > 0 and gain > gains[at - 1]:
                    gains[at], bonuses[at] = gains[at - 1], bonuses[at - 1]
                    firsts[at], seconds[at] = firsts[at - 1], seconds[at - 1]
                    at -= 1
                gains[at], bonuses[at], firsts[at], seconds[at] = gain, bonus, i, j
                count = min(count + 1, TRIES)
        for n in range(count):
            i, j = firsts[n], seconds[n]
            other = owners[j]
            saved = received[rank] + received[other]
            saved -= _received(rank, i, j, owners, begins, columns, keys, most[rank], second[rank], row)
            saved -= _received(other, j, i, owners, begins, columns, keys, most[other], second[other], row)
            if saved + bonuses[n] <= 0:
                continue
            for m in range(limits - 1):
                shift = values[m, i] - values[m, j]
                above[m, rank] -= shift
                above[m, other] += shift
            for of in (rank, other):
                for c in range(chunks):
                    if owners[c] != of:
                        demand[c] -= most[of, c]
            owners[i], owners[j] = other, rank
            _replace(members[rank], i, j)
            _replace(members[other], j, i)
            for of in (rank, other):
                _count(of, members[of], owners, begins, columns, keys, most[of], second[of], received, leaving, demand)
            _send(owners, demand, values[limits - 1], above[limits - 1])
            if (last_i == i and last_j == j) or (last_i == j and last_j == i):
                return
            last_i, last_j = i, j
            for of in range(ranks):
                stuck[of] = False
            break


@njit(cache=True)
def _neediest(above: Floats, received: Floats, stuck: Bools) -> int:
    last = len(above) - 1
    for kind in range(3):
        best, best_key = -1, 0.0
        for rank in range(len(stuck)):
            if kind == 0:
                key = 0.0
                for m in range(last):
                    key += max(above[m, rank], 0.0)
            elif kind == 1:
                key = above[last, rank]
            else:
                key = received[rank]
            if not stuck[rank] and key > best_key:
                best, best_key = rank, key
        if best >= 0:
            return best
    for rank in range(len(stuck)):
        if not stuck[rank]:
            return rank
    return -1


@njit(cache=True)
def _joining(
    rank: int, owners: Ints, most: Floats, reach: Floats, begins: Ints, columns: Ints, keys: Floats, joining: Floats
) -> None:
    for j in range(len(owners)):
        if owners[j] == rank:
            continue
        total = reach[j] - most[j]
        for e in range(begins[j], begins[j + 1]):
            column = columns[e]
            total -= keys[e] if owners[column] == rank else min(keys[e], most[column])
        joining[j] = total


@njit(cache=True)
def _received(
    rank: int,
    gone: int,
    come: int,
    owners: Ints,
    begins: Ints,
    columns: Ints,
    keys: Floats,
    most: Floats,
    second: Floats,
    row: Floats,
) -> float:
    """Columns that the rank would receive, had it one chunk instead of another."""
    for c in range(len(row)):
        row[c] = most[c]
    for e in range(begins[gone], begins[gone + 1]):
        column = columns[e]
        if keys[e] >= row[column]:
            row[column] = second[column]
    for e in range(begins[come], begins[come + 1]):
        row[columns[e]] = max(row[columns[e]], keys[e])
    total = 0.0
    for c in range(len(owners)):
        if c != come and (owners[c] != rank or c == gone):
            total += row[c]
    return total


@njit(cache=True)
def _count(
    rank: int,
    members: Ints,
    owners: Ints,
    begins: Ints,
    columns: Ints,
    keys: Floats,
    most: Floats,
    second: Floats,
    received: Floats,
    leaving: Floats,
    demand: Floats,
) -> None:
    """What is known of the rank's needs, anew; `demand` gets them added."""
    for c in range(len(owners)):
        most[c], second[c] = 0.0, 0.0
    for n in range(len(members)):
        chunk = members[n]
        for e in range(begins[chunk], begins[chunk + 1]):
            column, key = columns[e], keys[e]
            if key > most[column]:
                second[column] = most[column]
                most[column] = key
            elif key > second[column]:
                second[column] = key
    received[rank] = 0
    for c in range(len(owners)):
        if owners[c] != rank:
            received[rank] += most[c]
            demand[c] += most[c]
    for n in range(len(members)):
        chunk = members[n]
        alone = 0.0
        for e in range(begins[chunk], begins[chunk + 1]):
            column = columns[e]
            if owners[column] != rank and keys[e] == most[column]:
                alone += most[column] - second[column]
        leaving[chunk] = alone - most[chunk]


@njit(cache=True)
def _send(owners: Ints, demand: Floats, sent: Floats, above: Floats) -> None:
    total = 0.0
    for rank in range(len(above)):
        above[rank] = 0.0
    for c in range(len(owners)):
        sent[c] = demand[c]
        above[owners[c]] += demand[c]
        total += demand[c]
    for rank in range(len(above)):
        above[rank] -= SENDS * (total / len(above))


@njit(cache=True)
def _replace(members: Ints, gone: int, come: int) -> None:
    """One of the ascending members by another chunk."""
    at = 0
    while members[at] != gone:
        at += 1
    while at > 0 and members[at - 1] > come:
        members[at] = members[at - 1]
        at -= 1
    while at + 1 < len(members) and members[at + 1] < come:
        members[at] = members[at + 1]
        at += 1
    members[at] = come
