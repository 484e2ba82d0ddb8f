"""A first assignment: rank after rank, from the chunks that see most."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.problem import Problem, compiled, largest

# One chunk in so many that are still to come is taken at a time.
AT_ONCE = 4
# Chunks that need no more of others than so many are added one by one: less than it takes to look for all together.
_FEW = 6


def peel(problem: Problem, tolerance: float) -> Ints:
    """Owners of the chunks, `[chunks]`: each rank takes late rows of a long document, and light chunks to fill up.

    The late rows of a document are heavy and see the same keys, so one rank should have as many of them as its load
    allows; how few ranks share the late rows decides the traffic. What then fills up its tokens must be light. So a
    rank begins with the chunk that reaches furthest, goes on with those that need nothing more (the rows before it),
    and stops where the lightest chunks left would no longer fit beside them; then come chunks that need little more
    and bring the load towards the mean. For one causal document this is the zigzag; the last rank takes what is left.

    Needs `chunks` to be a multiple of the ranks.
    """
    cap = problem.mean_load * (1 + tolerance)
    if loops := compiled(problem):
        compiled_owners: Ints = loops.peel_chunks(problem, cap)
        return compiled_owners
    state = _State(problem, cap)
    for rank in range(problem.world_size - 1):
        state.open(rank)
        state.take(state.furthest())
        state.take_free()
        while state.room:
            state.take(state.filler())
    state.owners[state.owners < 0] = problem.world_size - 1
    return state.owners


class _State:
    """Chunks not yet taken, and the rank that is taking them."""

    def __init__(self, problem: Problem, cap: float) -> None:
        self.problem, self.cap = problem, cap
        self.owners = np.full(problem.chunks, -1)
        self.by_reach = np.argsort(-problem.reach, kind="stable")
        self.free = np.argsort(problem.load, kind="stable")
        """[n]: chunks that were free when the rank began, the lightest first; below, n is in this order."""
        self.scale = max(1.0, float(problem.reach.max(initial=0.0)))
        self.load_scale = max(problem.mean_load, 1.0)
        self.per_rank = (problem.chunks // problem.world_size, 0)
        if problem.odd.any():
            self.per_rank = (self.per_rank[0] - 1, 1)
        # Single numbers are read faster from lists.
        self.load_of, self.is_odd = problem.load.tolist(), problem.odd.tolist()
        self.row_begins, self.column_begins = problem.by_row.tolist(), problem.transposed[0].tolist()

    def open(self, rank: int) -> None:
        problem = self.problem
        self.rank, self.load = rank, 0.0
        self.by_reach = self.by_reach[self.owners[self.by_reach] < 0]
        self.free = self.free[self.owners[self.free] < 0]
        n = len(self.free)
        self.place = np.full(problem.chunks, n)
        """[chunk]: where it is in `free`, n if it is not."""
        self.place[self.free] = np.arange(n)
        self.loads: Floats = problem.load[self.free]
        self.left = self.per_rank
        """Chunks to take of the ordinary and of the odd ones."""
        few = 2 * self.room
        self.lightest = list(zip(self.free[:few].tolist(), self.loads[:few].tolist(), strict=True))
        """The first chunks that are free, with their loads: as many as the rank takes and as many again."""
        self.needed: Floats = np.zeros(problem.chunks)
        """[chunk]: columns that the rank needs of it; infinite for its own, which cost nothing more."""
        self.extra: Floats = np.append(problem.reach[self.free], 0.0)
        """[n + 1]: columns that it would receive more with the chunk; infinite once it was taken, and where the rank
        has no room for chunks of its kind. The last is of chunks that are not free."""

    @property
    def room(self) -> int:
        return self.left[0] + self.left[1]

    def furthest(self) -> Ints:
        """The free chunk that sees most of others."""
        return self.by_reach[:1]

    def take_free(self) -> None:
        """Chunks that need nothing more, the furthest first, while the lightest left would still fit beside them."""
        problem = self.problem
        while self.room:
            gratis = np.sort(self.free[self.extra[:-1] <= 0])
            extra = self.extra[self.place[gratis]]
            gratis = gratis[np.lexsort((-problem.reach[gratis], extra))][: self.room]
            light = np.array(self._light())
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
        problem, room = self.problem, self.room
        light = self._light()
        count = 0
        if self.load + light[room] <= self.cap:
            # Beside the lightest of the others all fit that are no heavier than what is left.
            count = int(self.loads.searchsorted(self.cap - self.load - light[room - 1], side="right"))
        loads = self.loads[:count]
        badness = loads - (problem.mean_load - self.load) / room
        np.abs(badness, out=badness)
        badness /= self.load_scale
        badness += self.extra[:count] / self.scale
        several = room // AT_ONCE
        if several > 1 and count > 2:
            best = largest(-badness, several + 1)
            best = np.sort(best[: min(several, int(np.isfinite(badness[best]).sum()) - 1)])
            if len(best) > 1:
                odd = sum([self.is_odd[chunk] for chunk in self.free[best].tolist()])
                together = self.load + sum(loads[best].tolist()) + light[room - len(best)]
                if together <= self.cap and odd <= self.left[1] and len(best) - odd <= self.left[0]:
                    return self.free[best]
        least = int(badness.argmin()) if count else 0
        if not count or badness[least] == np.inf:
            # None fits: the lightest that there is room for.
            least = int(np.isfinite(self.extra).argmax())
        return self.free[least : least + 1]

    def take(self, chunks: Ints) -> None:
        problem = self.problem
        taken = chunks.tolist()
        self.owners[chunks] = self.rank
        self.lightest = [free for free in self.lightest if free[0] not in taken]
        self.load += sum([self.load_of[chunk] for chunk in taken])
        odd = sum([self.is_odd[chunk] for chunk in taken])
        self.left = (self.left[0] - len(taken) + odd, self.left[1] - odd)
        if sum([self.row_begins[chunk + 1] - self.row_begins[chunk] for chunk in taken]) <= _FEW:
            for chunk in taken:
                entries = slice(self.row_begins[chunk], self.row_begins[chunk + 1])
                columns, keys = problem.needs.columns[entries].tolist(), problem.needs.keys[entries].tolist()
                for column, count in zip(columns, keys, strict=True):
                    self._need(column, count)
                self._need(chunk, np.inf)
        else:
            self._need_all(chunks)
        self.extra[self.place[chunks]] = np.inf
        if self.per_rank[1] and (odd or not self.left[0]):
            self.extra[:-1][problem.odd[self.free] != bool(self.left[1])] = np.inf

    def _need(self, column: int, count: float) -> None:
        """The rank needs so much of a column chunk, if not more."""
        before = float(self.needed[column])
        if count <= before:
            return
        self.needed[column] = count
        entries = slice(self.column_begins[column], self.column_begins[column + 1])
        needs = self.problem.transposed[1]
        keys = needs.keys[entries]
        # A row chunk is there once.
        self.extra[self.place[needs.rows[entries]]] -= np.minimum(keys, count) - np.minimum(keys, before)
        if count < np.inf:
            # Who owns a chunk need not receive it.
            self.extra[self.place[column]] -= count - before

    def _need_all(self, chunks: Ints) -> None:
        """All that chunks need, and themselves."""
        problem, before = self.problem, self.needed.copy()
        for chunk in chunks.tolist():
            entries = slice(self.row_begins[chunk], self.row_begins[chunk + 1])
            columns = problem.needs.columns[entries]
            self.needed[columns] = np.maximum(self.needed[columns], problem.needs.keys[entries])
        self.needed[chunks] = np.inf
        changed = (self.needed != before).nonzero()[0]
        of_changed, needs = problem.entries_of(changed), problem.transposed[1]
        columns, keys = needs.columns[of_changed], needs.keys[of_changed]
        less = np.minimum(keys, self.needed[columns]) - np.minimum(keys, before[columns])
        self.extra -= np.bincount(self.place[needs.rows[of_changed]], less, len(self.extra))
        received = changed[np.isfinite(self.needed[changed])]
        self.extra[self.place[received]] -= self.needed[received] - before[received]

    def _light(self) -> list[float]:
        """`[room + 1]`: load of the so many lightest free chunks together."""
        return [0.0, *accumulate([load for _, load in self.lightest[: self.room]])]
