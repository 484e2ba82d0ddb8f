"""Bettering an assignment by exchanging pairs of chunks between ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.problem import TOLERANCE, Problem

# What load beyond the tolerance costs, in sequences received per mean load: balance first, then traffic.
_OVERLOAD_PRICE = 50.0
# A rank that sends more than this many times what ranks send on average is one that others wait for. What a column
# above it costs, in columns received.
_SENDS = 1.25
_SEND_PRICE = 1.0
# Bounds the time: rounds x what a round walks over.
_MOST_WORK = 3_400_000
_MOST_CELLS = 1 << 23
# Pairs worked out exactly before a rank is given up.
_TRIES = 8


def swap(problem: Problem, owners: Ints) -> Ints:
    """Owners after exchanging pairs while that lowers overload and traffic, the most overloaded rank's first.

    Traffic is what all ranks receive, and what the busiest ones send: the first rows of a long document are wanted by
    every rank that has later ones, so they should not lie with one rank.
    """
    if problem.world_size == 1 or problem.mean_load <= 0 or problem.world_size * problem.chunks > _MOST_CELLS:
        return owners
    state = _Traffic(problem, owners.copy())
    # Of each measure, in mean loads: how far every rank is above its limit.
    loads = problem.loads / np.maximum(problem.mean_loads, 1e-30)[:, None]
    above = np.stack([np.bincount(owners, load, problem.world_size) for load in loads]) - (1 + TOLERANCE)
    price = _OVERLOAD_PRICE * float(problem.sizes.sum())
    stuck = np.zeros(problem.world_size, dtype=bool)
    mixed = bool(problem.odd.any())
    work_a_round = len(problem.needs.rows) + problem.world_size * problem.chunks // 2
    for _ in range(min(3 * problem.world_size, max(8, _MOST_WORK // work_a_round))):
        if stuck.all():
            break
        demand = state.incoming.sum(0)
        sent = np.bincount(state.owners, demand, problem.world_size)
        allowed = _SENDS * float(sent.mean())
        order = np.lexsort((-state.received, -np.maximum(sent - allowed, 0), -np.maximum(above, 0).sum(0)))
        rank = int(order[~stuck[order]][0])
        own = state.owners == rank
        mine, theirs = own.nonzero()[0], (~own).nonzero()[0]
        others = state.owners[theirs]
        moved = demand[mine][:, None] - demand[theirs]
        bonus = _SEND_PRICE * _relief(sent[rank] - allowed, sent[others] - allowed, moved)
        for load, over in zip(loads, above, strict=True):
            bonus += price * _relief(over[rank], over[others], load[mine][:, None] - load[theirs])
        gain = state.estimate(rank, mine, theirs) + bonus
        if mixed:
            gain[problem.odd[mine][:, None] != problem.odd[theirs]] = -np.inf
        stuck[rank] = True
        # The estimate looks at the two chunks one by one; the best few are worked out.
        for pair in _largest(gain.ravel(), _TRIES):
            i, j = divmod(int(pair), len(theirs))
            if gain[i, j] <= 0:
                break
            other = int(state.owners[theirs[j]])
            if state.try_swap(int(mine[i]), int(theirs[j]), float(bonus[i, j])):
                shift = loads[:, mine[i]] - loads[:, theirs[j]]
                above[:, rank] -= shift
                above[:, other] += shift
                stuck[:] = False
                break
    return state.owners


def _relief(mine: float, theirs: npt.NDArray[np.floating], shift: npt.NDArray[np.floating]) -> Floats:
    """How much less two ranks are above a limit together, so far above it each, once the first gives away `shift`."""
    after, received = mine - shift, theirs + shift
    np.maximum(after, 0, out=after)
    np.maximum(received, 0, out=received)
    after += received
    relief: Floats = (max(mine, 0.0) + np.maximum(theirs, 0)) - after
    return relief


def _largest(values: Floats, count: int) -> Ints:
    """Where the largest are, largest first; of equal ones the first."""
    count = min(count, len(values))
    top = np.sort(np.argpartition(values, len(values) - count)[len(values) - count :])
    return top[np.argsort(-values[top], kind="stable")]


class _Traffic:
    """The columns that ranks receive under an assignment, and what moving a chunk would change."""

    def __init__(self, problem: Problem, owners: Ints) -> None:
        self.problem, self.owners = problem, owners
        ranks, chunks = problem.world_size, problem.chunks
        self.received = np.zeros(ranks)
        """[ranks]: columns received."""
        self.incoming = np.zeros((ranks, chunks))
        """[rank, chunk]: columns of it received."""
        self.joining = np.zeros((ranks, chunks))
        """[rank, chunk]: columns that a rank would receive more if it owned the chunk too."""
        self.leaving = np.zeros(chunks)
        """[chunk]: columns that its rank would receive less without it."""
        self.top = np.zeros((ranks, chunks), dtype=np.int64)
        """[rank, chunk]: which of the rank's chunks needs most of it."""
        self.most, self.second = np.zeros((ranks, chunks)), np.zeros((ranks, chunks))
        """[rank, chunk]: how many columns that one needs, and how many the next."""
        for rank in range(ranks):
            self._update(rank)

    def estimate(self, rank: int, mine: Ints, theirs: Ints) -> Floats:
        """Columns saved by exchanging a chunk of `mine`, the rank's, for one of `theirs`, `[mine, theirs]`."""
        saved = self.leaving[mine][:, None] + (self.leaving[theirs] - self.joining[rank, theirs])
        return saved - self.joining[self.owners[theirs], mine[:, None]]

    def try_swap(self, i: int, j: int, bonus: float) -> bool:
        """Exchange chunks i and j if columns saved and bonus are together above 0."""
        a, b = int(self.owners[i]), int(self.owners[j])
        self.owners[i], self.owners[j] = b, a
        saved = self.received[a] + self.received[b] - self._needed(a, i, j) - self._needed(b, j, i)
        if saved + bonus <= 0:
            self.owners[i], self.owners[j] = a, b
            return False
        self._update(a)
        self._update(b)
        return True

    def _needed(self, rank: int, gone: int, come: int) -> float:
        """Columns that the rank receives, by the owners as they are now, once one chunk has left and one has come."""
        needs = self.problem.needs
        have = np.where(self.top[rank] == gone, self.second[rank], self.most[rank])
        entries = slice(self.problem.by_row[come], self.problem.by_row[come + 1])
        columns = needs.columns[entries]
        have[columns] = np.maximum(have[columns], needs.keys[entries])
        have[self.owners == rank] = 0
        return float(have.sum())

    def _update(self, rank: int) -> None:
        problem, needs = self.problem, self.problem.needs
        own = self.owners == rank
        mine = own.nonzero()[0]
        begins, counts = problem.by_row[mine], problem.row_counts[mine]
        row = np.arange(len(mine)).repeat(counts)
        entries = np.arange(len(row)) + (begins - (counts.cumsum() - counts)).repeat(counts)
        columns = needs.columns[entries]
        seen = np.zeros(len(own), dtype=bool)
        seen[columns] = True
        # Of many chunks a rank needs few.
        some = seen.nonzero()[0]
        table = np.zeros((len(mine), len(some)))
        table[row, (seen.cumsum() - 1)[columns]] = needs.keys[entries]

        everywhere = np.arange(len(some))
        top = table.argmax(0)
        most = table[top, everywhere]
        table[top, everywhere] = 0
        second = table.max(0)
        for values, default, found in (
            (self.top, mine[0], mine[top]),
            (self.most, 0, most),
            (self.second, 0, second),
            (self.incoming, 0, np.where(own[some], 0, most)),
        ):
            values[rank] = default
            values[rank, some] = found
        self.received[rank] = self.incoming[rank].sum()
        # A chunk that joins brings its needs, and its own columns need no longer travel; one that leaves the reverse.
        have = np.where(own, np.inf, self.most[rank])
        by_column, needs = problem.entries_of(have.nonzero()[0]), problem.transposed[1]
        less = np.minimum(needs.keys[by_column], have[needs.columns[by_column]])
        self.joining[rank] = problem.reach - np.bincount(needs.rows[by_column], less, len(own)) - self.incoming[rank]
        alone = np.bincount(top, np.where(own[some], 0, most - second), len(mine))
        most_of, second_of = self.most[rank, mine], self.second[rank, mine]
        self.leaving[mine] = alone - np.where(self.top[rank, mine] == mine, second_of, most_of)
