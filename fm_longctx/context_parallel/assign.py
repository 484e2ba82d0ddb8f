"""Which rank owns which chunk, by strategy."""

from __future__ import annotations

import numpy as np

from fm_longctx.context_parallel.coverage import Ints
from fm_longctx.context_parallel.peel import peel
from fm_longctx.context_parallel.problem import TOLERANCE, Assignment, Problem
from fm_longctx.context_parallel.swap import swap

STRATEGIES = ("balanced", "zigzag", "contiguous")

# An even layout of two runs a rank whose traffic is this near to the floor is not worth a search.
_GOOD_ENOUGH = 1.15
_EVEN = 1.005


def contiguous(chunks: int, world_size: int) -> Ints:
    """Rank r has the r-th run of chunks."""
    return np.arange(chunks) * world_size // max(chunks, 1)


def zigzag(chunks: int, world_size: int) -> Ints:
    """Rank r has the r-th slice from the front and the r-th from the back, 2 x world_size slices in all.

    >>> zigzag(8, 2).tolist()
    [0, 0, 1, 1, 1, 1, 0, 0]
    """
    per_rank = chunks // world_size
    if per_rank < 2:
        return contiguous(chunks, world_size)
    chunk = np.arange(chunks)
    # The two pieces of each group, dealt out to and fro: every rank gets one first piece and one last.
    piece = 2 * (chunk // per_rank) + (chunk % per_rank >= per_rank // 2)
    return np.minimum(piece, 2 * world_size - 1 - piece)


def balanced(problem: Problem) -> Assignment:
    """The cheapest of a contiguous, a zigzag and an affine assignment. Deterministic.

    The affine ones follow the mask: see `peel` and `swap`. They are not sought where the zigzag or the contiguous one
    is even and near the least traffic that an even layout can have.
    """
    simple = [problem.measure(make(problem.chunks, problem.world_size)) for make in (contiguous, zigzag)]
    if problem.chunks <= problem.world_size or problem.mean_load <= 0 or problem.world_size == 1:
        return simple[0]
    best = min(simple, key=lambda assignment: assignment.cost)
    enough = _GOOD_ENOUGH * problem.floor()
    for assignment in simple:
        if assignment.imbalance <= _EVEN and assignment.received <= enough:
            return assignment
    affine = problem.measure(swap(problem, peel(problem, TOLERANCE)))
    return min(best, affine, key=lambda assignment: assignment.cost)
