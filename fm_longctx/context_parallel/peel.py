"""A first assignment: rank after rank, from the chunks that see most."""

from __future__ import annotations

import numpy as np

from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.problem import Bools, Problem

# One chunk in so many that are still to come is taken at a time.
_AT_ONCE = 4


def peel(problem: Problem, tolerance: float) -> Ints:
    """Owners of the chunks, `[chunks]`: each rank takes late rows of a long document, and light chunks to fill up.

    The late rows of a document are heavy and see the same keys, so one rank should have as many of them as its load
    allows; how few ranks share the late rows decides the traffic. What then fills up its tokens must be light. So a
    rank begins with the chunk that reaches furthest, goes on with those that need nothing more (the rows before it),
    and stops where the lightest chunks left would no longer fit beside them; then come chunks that need little more
    and bring the load towards the mean. For one causal document this is the zigzag; the last rank takes what is left.

    Needs `chunks` to be a multiple of the ranks.
    """
    state = _State(problem, tolerance)
    for rank in range(problem.world_size - 1):
        state.open(rank)
        state.take(state.furthest())
        state.take_free()
        while state.room:
            state.take(state.filler())
    state.owners[state.free] = problem.world_size - 1
    return state.owners


class _State:
    """Chunks not yet taken, and the rank that is taking them."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem = problem
        self.cap = problem.mean_load * (1 + tolerance)
        self.owners = np.full(problem.chunks, -1)
        self.free: Bools = np.ones(problem.chunks, dtype=bool)
        self.by_reach = np.argsort(-problem.reach, kind="stable")
        self.by_load = np.argsort(problem.load, kind="stable")
        self.scale = max(1.0, float(problem.reach.max(initial=0.0)))
        self.per_rank = np.array([problem.chunks // problem.world_size, 0])
        if problem.odd.any():
            self.per_rank += [-1, 1]

    def open(self, rank: int) -> None:
        self.rank, self.load = rank, 0.0
        self.by_reach = self.by_reach[self.free[self.by_reach]]
        self.by_load = self.by_load[self.free[self.by_load]]
        self.among = np.sort(self.by_load)
        """Chunks that were free when the rank began."""
        self.left = self.per_rank.copy()
        """Chunks to take of the ordinary and of the odd ones."""
        self.needed: Floats = np.zeros(self.problem.chunks)
        """[chunk]: columns that the rank needs of it; infinite for its own, which cost nothing more."""
        self.extra: Floats = self.problem.reach.copy()
        """[chunk]: columns that it would receive more with the chunk."""

    @property
    def room(self) -> int:
        return int(self.left[0] + self.left[1])

    def furthest(self) -> Ints:
        """The free chunk that sees most of others."""
        return self.by_reach[:1]

    def take_free(self) -> None:
        """Chunks that need nothing more, the furthest first, while the lightest left would still fit beside them."""
        problem = self.problem
        while self.room:
            allowed = self._allowed()
            gratis = allowed[self.extra[allowed] <= 0]
            gratis = gratis[np.lexsort((-problem.reach[gratis], self.extra[gratis]))][: self.room]
            light = self._lightest()
            load = self.load + problem.load[gratis].cumsum() + light[self.room - 1 - np.arange(len(gratis))]
            odd = problem.odd[gratis].cumsum()
            fits = (load <= self.cap) & (odd <= self.left[1]) & (1 + np.arange(len(gratis)) - odd <= self.left[0])
            count = int(np.logical_and.accumulate(fits).sum())
            if count:
                self.take(gratis[:count])
            if count < len(gratis) or not count:
                return

    def filler(self) -> Ints:
        """The chunk that needs least more and brings the load nearest to its share; with much room left several."""
        problem = self.problem
        allowed = self._allowed()
        load = problem.load[allowed]
        light = self._lightest()
        heaviest_of_light = light[self.room] - light[self.room - 1]
        beside = np.where(load <= heaviest_of_light, light[self.room] - load, light[self.room - 1])
        fitting = self.load + load + beside <= self.cap
        if not fitting.any():
            return allowed[[load.argmin()]]
        candidates, load = allowed[fitting], load[fitting]
        share = (problem.mean_load - self.load) / self.room
        badness = self.extra[candidates] / self.scale + np.abs(load - share) / max(problem.mean_load, 1.0)
        count = min(self.room // _AT_ONCE, len(badness) - 1)
        if count > 1:
            best = np.sort(np.argpartition(badness, count)[:count])
            odd = int(problem.odd[candidates[best]].sum())
            together = self.load + load[best].sum() + light[self.room - count]
            if together <= self.cap and odd <= self.left[1] and count - odd <= self.left[0]:
                return candidates[best]
        return candidates[[badness.argmin()]]

    def take(self, chunks: Ints) -> None:
        problem, before = self.problem, self.needed.copy()
        for chunk in chunks:
            entries = slice(problem.by_row[chunk], problem.by_row[chunk + 1])
            columns = problem.needs.columns[entries]
            self.needed[columns] = np.maximum(self.needed[columns], problem.needs.keys[entries])
        self.needed[chunks] = np.inf
        self.owners[chunks] = self.rank
        self.free[chunks] = False
        self.load += float(problem.load[chunks].sum())
        self.left -= np.bincount(problem.odd[chunks], minlength=2)

        changed = (self.needed != before).nonzero()[0]
        needs = problem.transposed[1]
        of_changed = problem.entries_of(changed)
        columns, keys = needs.columns[of_changed], needs.keys[of_changed]
        less = np.maximum(keys - before[columns], 0) - np.maximum(keys - self.needed[columns], 0)
        self.extra -= np.bincount(needs.rows[of_changed], less, problem.chunks)
        # Who owns a chunk need not receive it.
        received = changed[np.isfinite(self.needed[changed])]
        self.extra[received] -= self.needed[received] - before[received]

    def _allowed(self) -> Ints:
        """Free chunks of a kind that the rank has room for."""
        free = self.among[self.free[self.among]]
        if self.left.all() or not self.per_rank[1]:
            return free
        odd = self.problem.odd[free]
        return free[odd if self.left[1] else ~odd]

    def _lightest(self) -> Floats:
        """`[room + 1]`: load of the so many lightest free chunks together."""
        loads = self.problem.load[self.by_load[self.free[self.by_load]][: self.room]]
        return np.concatenate([np.zeros(1), loads.cumsum()])
