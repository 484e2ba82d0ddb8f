"""What an assignment of chunks to ranks is judged by."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.coverage import Floats, Ints, Needs

Bools = npt.NDArray[np.bool_]

# Load above the mean, as a share of it, that is not worth a single key more of traffic.
TOLERANCE = 0.015
# 1% of imbalance beyond the tolerance weighs like at least 5% of an all-gather, however slow the link is said to be.
_LEAST_PRICE = 5.0
# Ranks x chunks from which on compiled loops are worth their loading.
_MANY_CELLS = 1000


class Assignment(NamedTuple):
    """An owner for each chunk, and what it costs."""

    owners: Ints
    """`[chunks]`: the rank of each chunk."""
    imbalance: float
    """Largest over mean load, of the measure that is least even; 1.0 without load."""
    received: float
    """Columns received over what an all-gather receives, mean over ranks, as far as the needs tell."""
    cost: float
    """For comparing assignments: what is received, plus the overload at its price, in all-gathers."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Chunks of a sequence to be shared out: equally many positions a rank, little traffic, equal load."""

    world_size: int
    sizes: Ints
    """`[chunks]`: positions."""
    odd: Bools
    """`[chunks]`: chunks of another size than the rest; a rank owns at most one. As `chunk_grid` makes them: the last
    chunk of each of `world_size` equal groups."""
    loads: Floats
    """`[measures, chunks]`: what must be even over the ranks, each by itself: scores of the chunk's rows that are
    visible, and scores of the tiles that a kernel visits for them."""
    needs: Needs
    """What the rows of a chunk see of others. A rank is taken to need of a chunk as many columns as its most demanding
    chunk of rows: exact for packed causal documents."""
    cost: CostModel
    a_host: int
    """How many of the ranks are on a host."""

    @property
    def chunks(self) -> int:
        return len(self.sizes)

    @cached_property
    def load(self) -> Floats:
        """`[chunks]`: the mean of the measures."""
        mean: Floats = self.loads.mean(0)
        return mean

    @cached_property
    def mean_loads(self) -> Floats:
        """`[measures]`: of a rank."""
        means: Floats = self.loads.sum(1) / self.world_size
        return means

    @cached_property
    def mean_load(self) -> float:
        return float(self.load.sum()) / self.world_size

    @cached_property
    def by_row(self) -> Ints:
        """`[chunks + 1]`: where each row chunk's entries begin in `needs`."""
        return np.searchsorted(self.needs.rows, np.arange(self.chunks + 1))

    @cached_property
    def row_counts(self) -> Ints:
        """`[chunks]`: how many entries each row chunk has in `needs`."""
        return np.diff(self.by_row)

    @cached_property
    def transposed(self) -> tuple[Ints, Needs]:
        """`needs` ascending by column chunk, and where each column chunk's entries begin."""
        order = np.argsort(self.needs.columns, kind="stable")
        needs = Needs(self.needs.rows[order], self.needs.columns[order], self.needs.keys[order])
        return np.searchsorted(needs.columns, np.arange(self.chunks + 1)), needs

    def entries_of(self, columns: Ints) -> Ints | slice:
        """Where the entries of these column chunks, at least one and ascending, are in `transposed`; if they lie close
        together with those between them, whose chunks must not matter."""
        begins = self.transposed[0][columns]
        counts = self.transposed[0][columns + 1] - begins
        first, end, total = int(begins[0]), int(begins[-1] + counts[-1]), int(counts.sum())
        if end - first <= 2 * total:
            return slice(first, end)
        return ranges(begins, counts)

    @cached_property
    def reach(self) -> Floats:
        """`[chunks]`: columns of other chunks that a chunk's rows see."""
        return np.bincount(self.needs.rows, self.needs.keys, self.chunks).astype(np.float64)

    @cached_property
    def price(self) -> float:
        """What an imbalance of 1 costs, in all-gathers: attention that others wait for over a hidden exchange."""
        num_bytes = self.sizes.sum() * self.cost.forward_key_bytes / self.world_size
        beside = min(self.a_host, self.world_size)
        far, near = np.array((self.world_size - beside) * num_bytes), np.array((beside - 1) * num_bytes)
        transfer = float(self.cost.transfer(far, near))
        compute = float(self.cost.forward_compute(np.array(self.mean_load)))
        hidden = self.cost.hidden_price * transfer
        return max(_LEAST_PRICE, compute / hidden if hidden > 0 else _LEAST_PRICE)

    def measure(self, owners: Ints) -> Assignment:
        """The assignment with its imbalance, traffic and cost."""
        loads = np.stack([np.bincount(owners, load, self.world_size) for load in self.loads])
        imbalance = float((loads.max(1) / self.mean_loads).max()) if (self.mean_loads > 0).all() else 1.0
        elsewhere = self.sizes.sum() - np.bincount(owners, self.sizes, self.world_size)
        fractions = self.received(owners).sum(1) / np.maximum(elsewhere, 1)
        received = float(fractions.mean())
        return Assignment(owners, imbalance, received, received + self.price * max(0.0, imbalance - 1 - TOLERANCE))

    def received(self, owners: Ints) -> Floats:
        """Columns that each rank receives of each chunk, `[ranks, chunks]`."""
        needed = np.zeros((self.world_size, self.chunks))
        if loops := compiled(self):
            loops.most_needed(needed, owners, *self.needs)
        else:
            np.maximum.at(needed, (owners[self.needs.rows], self.needs.columns), self.needs.keys)
        needed[owners, np.arange(self.chunks)] = 0
        return needed

    def merging(self, owners: Ints) -> Floats:
        """`[ranks]`: rows of each rank that see columns of others, by whole chunks."""
        return merging_rows(self.needs, self.sizes, owners, self.world_size)

    def floor(self, tolerance: float = TOLERANCE) -> float:
        """A lower bound on the received fraction of any assignment whose imbalance is at most 1 + tolerance.

        The row chunks that see a column have together a load that takes at least so many ranks; one of them may own
        the column, the others receive it.
        """
        load = np.bincount(self.needs.columns, self.load[self.needs.rows], self.chunks) + self.load
        most = np.zeros(self.chunks)
        np.maximum.at(most, self.needs.columns, self.needs.keys)
        cap = self.mean_load * (1 + tolerance)
        ranks = np.ceil(load / cap - 1e-9) if cap > 0 else np.ones(self.chunks)
        tokens = float(self.sizes.sum())
        everything = tokens * (self.world_size - 1)
        return float((np.maximum(ranks - 1, 0) * most).sum() / everything) if everything else 0.0


def merging_rows(needs: Needs, sizes: Ints, owners: Ints, world_size: int) -> Floats:
    """`[ranks]`: rows of the chunks that see columns of chunks of another rank."""
    sees = np.zeros(len(sizes), dtype=bool)
    sees[needs.rows[owners[needs.rows] != owners[needs.columns]]] = True
    return np.bincount(owners, sizes * sees, world_size).astype(np.float64)


def compiled(problem: Problem) -> ModuleType | None:
    """The compiled forms of `peel` and `swap`, where numba is installed and there is enough to do to load them for.

    Whether a process has loaded them already does not count: a plan depends on its arguments, not on the plans before.
    """
    return _loops() if problem.world_size * problem.chunks >= _MANY_CELLS else None


@cache
def _loops() -> ModuleType | None:
    if find_spec("numba") is None:
        return None
    try:
        return import_module(f"{__package__}.compiled")
    except (ImportError, RuntimeError) as error:
        # A numba that does not fit this numpy, or that finds no folder to keep what it compiles in.
        warnings.warn(f"plans are made without numba, and slower: {error}", stacklevel=2)
        return None


def ranges(begins: Ints, counts: Ints) -> Ints:
    """The integers from each of `begins` on, so many of each, one after the other.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = counts.cumsum() - counts
    found: Ints = np.arange(int(counts.sum()), dtype=np.int64) + (begins - before).repeat(counts)
    return found


def largest(values: Floats, count: int) -> Ints:
    """Where the largest are, largest first; of equal ones the first, on whatever machine."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        top = (values >= least).nonzero()[0]
    else:
        top = np.arange(len(values))
    where: Ints = top[np.argsort(-values[top], kind="stable")[:count]]
    return where
