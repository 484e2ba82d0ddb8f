"""Which rank owns which chunk: equal tokens, equal area, and few keys to receive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fm_longctx.context_parallel.coverage import Ints

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# Area above the mean, as a share of it, that is not worth a single key more of traffic.
TOLERANCE = 0.015
# What a rank's area beyond that costs, in sequences received per mean area: balance first, then traffic.
_OVERLOAD_PRICE = 50.0


class Assignment(NamedTuple):
    """An owner for each chunk, and what it costs."""

    owners: Ints
    """`[chunks]`: the rank of each chunk."""
    imbalance: float
    """Largest over mean area, 1.0 without area."""
    received: float
    """Columns received over what an all-gather receives, mean over ranks, as far as `visible` tells."""

    @property
    def cost(self) -> float:
        """For choosing between assignments: 1% of imbalance beyond the tolerance weighs like 5% of an all-gather."""
        return self.received + 5.0 * max(0.0, self.imbalance - 1 - TOLERANCE)


def assign(area: Ints, visible: Ints, sizes: Ints, odd: Bools, world_size: int) -> Assignment:
    """The cheapest of a contiguous, a zigzag and an affine assignment. Deterministic.

    Args:
        area: unmasked scores of each row chunk, `[chunks]`.
        visible: how many columns of chunk c row chunk r sees, `[r, c]`. A rank is taken to need of a chunk as many
            columns as its most demanding row chunk: exact for packed causal documents.
        sizes: positions of each chunk, `[chunks]`.
        odd: `[chunks]`: chunks of another size than the rest; a rank owns at most one. As `chunk_grid` makes them: the
            last chunk of each of `world_size` equal groups.
        world_size: ranks.
    """
    chunks = len(area)
    remote = visible.astype(np.float64)
    np.fill_diagonal(remote, 0.0)
    if chunks <= world_size:
        return _measure(area, remote, sizes, np.arange(chunks), world_size)
    per_rank = chunks // world_size
    group = np.arange(chunks) // per_rank
    # The two pieces of each group, dealt out to and fro: every rank gets one first piece and one last.
    piece = 2 * group + (np.arange(chunks) % per_rank >= per_rank // 2)
    zigzag = np.minimum(piece, 2 * world_size - 1 - piece)
    affine = _greedy(area, remote, odd, world_size)
    if world_size > 1 and area.any():
        affine = _swap(area, remote, odd, affine, world_size, int(sizes.sum()))
    candidates = [_measure(area, remote, sizes, owners, world_size) for owners in (group, zigzag, affine)]
    return min(candidates, key=lambda candidate: candidate.cost)


def _measure(area: Ints, remote: Floats, sizes: Ints, owners: Ints, world_size: int) -> Assignment:
    load = np.bincount(owners, area, world_size)
    imbalance = float(load.max() * world_size / load.sum()) if load.any() else 1.0
    fractions = []
    for rank in range(world_size):
        mine = owners == rank
        elsewhere = int(sizes[~mine].sum())
        needed = remote[mine].max(0, initial=0.0)[~mine].sum()
        fractions.append(needed / elsewhere if elsewhere else 0.0)
    return Assignment(owners, imbalance, float(np.mean(fractions)))


def _greedy(area: Ints, remote: Floats, odd: Bools, world_size: int) -> Ints:
    """The heaviest chunk first, each to the rank that must receive the fewest further columns for it.

    Only ranks with room for its tokens count, and of them those with room for its area, if there are any. Late chunks
    of a long document are heavy and see the same keys, so a rank collects them until its area is full; what fills up
    its tokens are short documents.
    """
    room = np.empty((2, world_size), dtype=np.int64)
    room[0] = (len(area) - int(odd.sum())) // world_size
    room[1] = 1
    limit = area.sum() / world_size
    first = (remote > 0).argmax(1)
    last = len(area) - (remote[:, ::-1] > 0).argmax(1)
    owners = np.full(len(area), -1)
    load = np.zeros(world_size)
    received = np.zeros((world_size, len(area)))
    for chunk in np.argsort(-area, kind="stable"):
        kind = int(odd[chunk])
        ranks = np.flatnonzero(room[kind] > 0)
        fitting = ranks[load[ranks] + area[chunk] <= limit]
        band = slice(first[chunk], last[chunk])
        if len(fitting):
            extra = np.maximum(remote[chunk, band] - received[fitting, band], 0).sum(1)
            rank = fitting[np.lexsort((load[fitting], extra))[0]]
        else:
            rank = ranks[load[ranks].argmin()]
        owners[chunk] = rank
        load[rank] += area[chunk]
        room[kind, rank] -= 1
        np.maximum(received[rank, band], remote[chunk, band], out=received[rank, band])
    return owners


def _swap(area: Ints, remote: Floats, odd: Bools, owners: Ints, world_size: int, num_tokens: int) -> Ints:
    """Exchange pairs of chunks between ranks while that lowers overload and traffic, the busiest rank's first."""
    total = float(area.sum())
    state = _Traffic(remote, owners.copy(), world_size)
    load = np.bincount(owners, area, world_size)
    limit = total / world_size * (1 + TOLERANCE)
    price = _OVERLOAD_PRICE * num_tokens * world_size / total
    stuck = np.zeros(world_size, dtype=bool)
    for _ in range(8 * world_size):
        if stuck.all():
            break
        # Overload decides, then traffic.
        order = np.lexsort((-state.received, -np.maximum(load - limit, 0)))
        rank = int(order[~stuck[order]][0])
        mine = np.flatnonzero(state.owners == rank)
        theirs = np.flatnonzero(state.owners != rank)
        shift = area[mine][:, None] - area[theirs][None, :]
        others = load[state.owners[theirs]]
        relief = (
            np.maximum(load[rank] - limit, 0)
            + np.maximum(others - limit, 0)
            - np.maximum(load[rank] - shift - limit, 0)
            - np.maximum(others + shift - limit, 0)
        )
        gain = state.estimate(rank, mine, theirs) + price * relief
        gain[odd[mine][:, None] != odd[theirs][None, :]] = -np.inf
        stuck[rank] = True
        # The estimate looks at the two chunks one by one; the best few are worked out.
        for pair in np.argsort(-gain, axis=None, kind="stable")[:8]:
            i, j = divmod(int(pair), len(theirs))
            if gain[i, j] <= 0:
                break
            if state.try_swap(int(mine[i]), int(theirs[j]), price * relief[i, j]):
                load[rank] -= shift[i, j]
                load[state.owners[mine[i]]] += shift[i, j]
                stuck[:] = False
                break
    return state.owners


class _Traffic:
    """The columns that ranks receive under an assignment, and what moving a chunk would change."""

    def __init__(self, remote: Floats, owners: Ints, world_size: int) -> None:
        self.remote, self.owners = remote, owners
        chunks = len(owners)
        self.received = np.zeros(world_size)
        """[ranks]: columns received."""
        self.joining = np.zeros((world_size, chunks))
        """[rank, chunk]: columns that a rank would receive more if it owned the chunk too."""
        self.leaving = np.zeros(chunks)
        """[chunk]: columns that its rank would receive less without it."""
        for rank in range(world_size):
            self._update(rank)

    def estimate(self, rank: int, mine: Ints, theirs: Ints) -> Floats:
        """Columns saved by exchanging a chunk of `mine`, the rank's, for one of `theirs`, `[mine, theirs]`."""
        saved = self.leaving[mine][:, None] + (self.leaving[theirs] - self.joining[rank, theirs])[None, :]
        return saved - self.joining[self.owners[theirs]][:, mine].T

    def try_swap(self, i: int, j: int, bonus: float) -> bool:
        """Exchange chunks i and j if columns saved and bonus are together above 0."""
        ranks = (int(self.owners[i]), int(self.owners[j]))
        self.owners[[i, j]] = self.owners[[j, i]]
        saved = sum(self.received[rank] - self._needed(np.flatnonzero(self.owners == rank)) for rank in ranks)
        if saved + bonus <= 0:
            self.owners[[i, j]] = self.owners[[j, i]]
            return False
        for rank in ranks:
            self._update(rank)
        return True

    def _needed(self, chunks: Ints) -> float:
        columns = self.remote[chunks].max(0)
        columns[chunks] = 0
        return float(columns.sum())

    def _update(self, rank: int) -> None:
        own = self.owners == rank
        mine = np.flatnonzero(own)
        table = self.remote[mine]
        everywhere = np.arange(len(own))
        top = table.argmax(0)
        most = table[top, everywhere]
        table[top, everywhere] = 0
        second = table.max(0)
        received = np.where(own, 0, most)
        self.received[rank] = received.sum()
        # A chunk that joins brings its needs, and its own columns need no longer travel; one that leaves the reverse.
        more = np.maximum(self.remote - most, 0)
        more[:, own] = 0
        self.joining[rank] = more.sum(1) - received
        alone = np.bincount(top, np.where(own, 0, most - second), len(mine))
        self.leaving[mine] = alone - np.where(top[mine] == np.arange(len(mine)), second[mine], most[mine])
