"""Bettering an assignment by exchanging pairs of chunks between ranks."""

from __future__ import annotations

import numpy as np

from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.problem import TOLERANCE, Bools, Problem, compiled, largest, ranges

# What load beyond the tolerance costs, in sequences received per mean load: balance first, then traffic.
_OVERLOAD_PRICE = 50.0
# A rank that sends more than this many times what ranks send on average is one that others wait for: a column above it
# costs as much as one received.
SENDS = 1.25
# Bounds the time: rounds x what a round walks over; but so many rounds in any case.
_MOST_WORK = 3_400_000
_LEAST_ROUNDS = 64
_MOST_CELLS = 1 << 23
# Pairs worked out exactly before a rank is given up.
TRIES = 8
# Ranks whose needs are counted together.
_AT_ONCE = 8
_BOTH = np.array([[0], [1]])


def swap(problem: Problem, owners: Ints) -> Ints:
    """Owners after exchanging pairs while that lowers overload and traffic, the most overloaded rank's first.

    Traffic is what all ranks receive, and what the busiest ones send: the first rows of a long document are wanted by
    every rank that has later ones, so they should not lie with one rank.

    Args:
        owners: `[chunks]`: equally many chunks for every rank.
    """
    ranks = problem.world_size
    if ranks == 1 or problem.mean_load <= 0 or ranks * problem.chunks > _MOST_CELLS:
        return owners
    members, values, above = limits(problem, owners)
    work_a_round = len(problem.needs.rows) + ranks * problem.chunks // 2
    rounds = min(3 * ranks, max(_LEAST_ROUNDS, _MOST_WORK // work_a_round))
    if loops := compiled(problem):
        better: Ints = loops.swap_chunks(problem, owners, members, values, above, rounds)
        return better
    state = _State(problem, owners, members, values, above)
    stuck = np.zeros(ranks, dtype=bool)
    last: set[int] = set()
    for _ in range(rounds):
        if stuck.all():
            break
        rank = state.neediest(~stuck)
        stuck[rank] = True
        for i, j, bonus in state.promising(rank):
            if state.try_swap(i, j, bonus):
                if last == {i, j}:
                    # What one exchange gains the next undoes: it would go on to and fro.
                    return state.owners
                last = {i, j}
                stuck[:] = False
                break
    return state.owners


def limits(problem: Problem, owners: Ints) -> tuple[Ints, Floats, Floats]:
    """What a search begins with.

    Returns:
        members: `[ranks, chunks of a rank]`, ascending.
        values: `[measures + 1, chunks]`: what a rank may have so much of: loads, at what overload costs, and columns
            that are sent, which are still to be counted.
        above: `[measures + 1, ranks]`: how far ranks are above what they may have.
    """
    price = _OVERLOAD_PRICE * float(problem.sizes.sum())
    loads = problem.loads * (price / np.maximum(problem.mean_loads, 1e-30))[:, None]
    members = np.argsort(owners, kind="stable").reshape(problem.world_size, -1)
    overload = loads[:, members].sum(2) - price * (1 + TOLERANCE)
    values, above = (np.concatenate([x, np.zeros((1, x.shape[1]))]) for x in (loads, overload))
    return members, values, above


class _State:
    """An assignment, the columns that its ranks receive, and what exchanging two chunks would change."""

    def __init__(self, problem: Problem, owners: Ints, members: Ints, values: Floats, above: Floats) -> None:
        self.problem, self.owners = problem, owners.copy()
        self.members, self.values, self.above = members, values, above
        ranks, chunks = problem.world_size, problem.chunks
        self.most, self.second = np.zeros((ranks, chunks)), np.zeros((ranks, chunks))
        """[rank, chunk]: columns of it that the one of the rank's chunks needs that needs most, and that the next does.
        """
        self.have = np.zeros((ranks, chunks))
        """[rank, chunk]: `most`, infinite for its own."""
        self.incoming = np.zeros((ranks, chunks))
        """[rank, chunk]: columns of it received."""
        self.received = np.zeros(ranks)
        """[ranks]: columns received."""
        self.leaving = np.zeros(chunks)
        """[chunk]: columns that its rank would receive less without it."""
        self.mixed = bool(problem.odd.any())
        for first in range(0, ranks, _AT_ONCE):
            self._count(np.arange(first, min(first + _AT_ONCE, ranks)))
        self._send(self.incoming.sum(0))

    def neediest(self, among: Bools) -> int:
        """Of some ranks the one with most overload; without any the one that sends most above what it may; else the one
        that receives most."""
        for key in (np.maximum(self.above[:-1], 0).sum(0), self.above[-1], self.received):
            rank = int(np.where(among, key, 0.0).argmax())
            if key[rank] > 0 and among[rank]:
                return rank
        return int(among.argmax())

    def joining(self, rank: int) -> Floats:
        """`[chunks]`: columns that the rank would receive more if it owned the chunk too."""
        # A chunk that joins brings its needs, and its own columns need no longer travel.
        problem, have = self.problem, self.have[rank]
        of, needs = problem.entries_of(have.nonzero()[0]), problem.transposed[1]
        less = np.minimum(needs.keys[of], have[needs.columns[of]])
        return problem.reach - np.bincount(needs.rows[of], less, problem.chunks) - self.incoming[rank]

    def joined_by(self, chunks: Ints) -> Floats:
        """`[ranks, chunks]`: the same of a few chunks and every rank but theirs."""
        problem = self.problem
        counts = problem.row_counts[chunks]
        entries = ranges(problem.by_row[chunks], counts)
        joined = problem.reach[chunks] - self.incoming[:, chunks]
        if len(entries):
            less = np.minimum(problem.needs.keys[entries], self.have[:, problem.needs.columns[entries]])
            some = counts.nonzero()[0]
            joined[:, some] -= np.add.reduceat(less, (counts.cumsum() - counts)[some], axis=1)
        return joined

    def promising(self, rank: int) -> list[tuple[int, int, float]]:
        """Pairs of a chunk of the rank's and one of another's whose exchange seems to lower the cost, the best first;
        with what is gained by each but in columns received.

        The estimate takes the two chunks one by one, and what is sent of each chunk as unchanged.
        """
        mine, theirs = self.members[rank], (self.owners != rank).nonzero()[0]
        of = self.owners[theirs]
        above = np.maximum(self.above, 0)
        most = (above + above[:, rank, None]).sum(0)
        by_mine = self.leaving[mine] - self.joined_by(mine)
        by_theirs = self.leaving[theirs] - self.joining(rank)[theirs]
        # [mine, theirs]
        saved = by_mine.T[:, of]
        saved += by_theirs
        if self.mixed:
            saved[self.problem.odd[mine][:, None] != self.problem.odd[theirs]] = -np.inf
        i, j = (saved > -most[of]).nonzero()
        if 4 * len(i) > saved.size:
            i, j = np.divmod(self._likeliest(rank, mine, theirs, saved + most[of]), len(theirs))
        bonus = self._relief(rank, mine[i], theirs[j])
        gain = saved[i, j] + bonus
        best = largest(gain, TRIES)
        best = best[gain[best] > 0]
        return list(zip(mine[i[best]].tolist(), theirs[j[best]].tolist(), bonus[best].tolist(), strict=True))

    def _likeliest(self, rank: int, mine: Ints, theirs: Ints, gain: Floats) -> Ints:
        """Of very many pairs the few best, but for rounding: where they are in `gain`, ascending.

        Args:
            gain: `[mine, theirs]`, what they would save if nobody were above what it may have afterwards.
        """
        for value, above in zip(self.values, self.above, strict=True):
            # Of two whose excess is x + y together, max(x, 0) + max(y, 0) is half of x + y + max(|x - y|, |x + y|).
            half = 0.5 * (above[rank] + above[self.owners[theirs]])
            after = (above[rank] - value[mine])[:, None] + (value[theirs] - half)
            np.abs(after, out=after)
            gain -= np.maximum(after, np.abs(half), out=after)
            gain -= half
        return np.sort(largest(gain.ravel(), 2 * TRIES))

    def _relief(self, rank: int, mine: Ints, theirs: Ints) -> Floats:
        """`[pairs]`: how much less the rank and another are above what they may have, once they exchange two chunks."""
        above, beside = self.above[:, rank, None], self.above[:, self.owners[theirs]]
        shift = self.values[:, mine] - self.values[:, theirs]
        after = np.maximum(above - shift, 0) + np.maximum(beside + shift, 0)
        relief: Floats = ((np.maximum(above, 0) + np.maximum(beside, 0)) - after).sum(0)
        return relief

    def try_swap(self, i: int, j: int, bonus: float) -> bool:
        """Exchange chunks i and j if columns saved and bonus are together above 0."""
        both = self.owners[[i, j]]
        incoming = self._incoming(both, i, j)
        if float(self.received[both].sum() - incoming.sum()) + bonus <= 0:
            return False
        a, b = both.tolist()
        demand = self.values[-1] + (incoming.sum(0) - self.incoming[both].sum(0))
        self.owners[i], self.owners[j] = b, a
        shift = self.values[:-1, i] - self.values[:-1, j]
        self.above[:-1, a] -= shift
        self.above[:-1, b] += shift
        for rank, gone, come in ((a, i, j), (b, j, i)):
            row = self.members[rank]
            row[row == gone] = come
            row.sort()
        self._count(both)
        self._send(demand)
        return True

    def _send(self, demand: Floats) -> None:
        """What ranks send above what they may, if so much is wanted of each chunk, `[chunks]`."""
        sent = np.bincount(self.owners, demand, self.problem.world_size)
        self.values[-1], self.above[-1] = demand, sent - SENDS * float(sent.mean())

    def _incoming(self, ranks: Ints, i: int, j: int) -> Floats:
        """`[2, chunks]`: columns of each that two ranks would receive if the first gave i for the other's j."""
        needed = self.most[ranks]
        for of_rank, second, gone, come in ((needed[0], ranks[0], i, j), (needed[1], ranks[1], j, i)):
            columns, keys = self._needs(gone)
            most = of_rank[columns]
            # Of two that need equally many the next needs as many.
            of_rank[columns] = np.where(keys < most, most, self.second[second, columns])
            columns, keys = self._needs(come)
            of_rank[columns] = np.maximum(of_rank[columns], keys)
        given = needed[0, i], needed[1, j]
        needed[_BOTH, self.members[ranks]] = 0
        needed[0, i], needed[1, j] = given
        needed[0, j] = needed[1, i] = 0
        return needed

    def _needs(self, chunk: int) -> tuple[Ints, Floats]:
        entries = slice(self.problem.by_row[chunk], self.problem.by_row[chunk + 1])
        return self.problem.needs.columns[entries], self.problem.needs.keys[entries]

    def _count(self, ranks: Ints) -> None:
        """What is known of some ranks' needs, anew."""
        problem, needs = self.problem, self.problem.needs
        mine = self.members[ranks]
        counts = problem.row_counts[mine].ravel()
        entries = ranges(problem.by_row[mine].ravel(), counts)
        columns = needs.columns[entries]
        seen = np.zeros(problem.chunks, dtype=bool)
        seen[columns] = True
        # Of many chunks a rank needs few.
        some = seen.nonzero()[0]
        table = np.zeros((mine.size, len(some)))
        table[np.arange(mine.size).repeat(counts), (seen.cumsum() - 1)[columns]] = needs.keys[entries]
        table = table.reshape(*mine.shape, -1)

        of = ranks[:, None]
        nth, everywhere = np.arange(len(ranks))[:, None], np.arange(len(some))
        top = table.argmax(1)
        most = table[nth, top, everywhere]
        table[nth, top, everywhere] = 0
        second = table.max(1)
        elsewhere = self.owners[some] != of
        incoming = most * elsewhere
        for values, found in (
            (self.most, most),
            (self.have, most),
            (self.second, second),
            (self.incoming, incoming),
        ):
            values[ranks] = 0
            values[of, some] = found
        self.have[of, mine] = np.inf
        self.received[ranks] = incoming.sum(1)
        # A chunk that leaves needs nothing any more, and its own columns must travel.
        alone = np.bincount((top + nth * mine.shape[1]).ravel(), ((most - second) * elsewhere).ravel(), mine.size)
        self.leaving[mine] = alone.reshape(mine.shape) - self.most[of, mine]
