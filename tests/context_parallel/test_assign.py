"""Assignments: what they promise about chunks, and that their estimates are exact where they claim so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.packs import pack
from fm_longctx import FlashMask
from fm_longctx.context_parallel import problem as problem_module
from fm_longctx.context_parallel.assign import balanced, contiguous, zigzag
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.coverage import chunk_areas, chunk_needs, segments
from fm_longctx.context_parallel.layout import chunk_grid
from fm_longctx.context_parallel.peel import peel
from fm_longctx.context_parallel.problem import TOLERANCE, Problem, compiled
from fm_longctx.context_parallel.swap import _State, limits, swap
from fm_longctx.mask import builders


def problem_of(mask, world_size, chunk_size, **cost):
    bounds, odd = chunk_grid(mask.num_rows, world_size, chunk_size)
    parts = segments(mask)
    return bounds, Problem(
        world_size=world_size,
        sizes=np.diff(bounds),
        odd=odd,
        loads=chunk_areas(parts, bounds).astype(float)[None],
        needs=chunk_needs(parts, bounds),
        cost=CostModel(**cost),
        a_host=1,
    )


def received_by_counting(mask, bounds, owners, world_size):
    """Keys that each rank receives, from the dense mask."""
    source = torch.from_numpy(np.repeat(owners, np.diff(bounds)))
    dense = mask.to_dense()[0, 0]
    return [int((dense[source == rank].any(0) & (source != rank)).sum()) for rank in range(world_size)]


# The second half sees the first, and nothing else is seen: no chunk sees its own columns.
HALVES = torch.zeros(600, 600, dtype=torch.bool)
HALVES[300:, :300] = True


@pytest.mark.parametrize(
    "mask",
    [*(builders.causal_document(pack(2_000, seed)) for seed in range(5)), FlashMask.from_dense(HALVES)],
    ids=lambda mask: f"{mask.num_rows}",
)
@pytest.mark.parametrize("world_size, chunk_size", [(2, 50), (5, 33), (8, 20)])
def test_traffic_is_estimated_exactly(mask, world_size, chunk_size):
    bounds, problem = problem_of(mask, world_size, chunk_size)
    best = balanced(problem)
    n = mask.num_rows
    elsewhere = n - np.bincount(best.owners, problem.sizes, world_size)
    received = received_by_counting(mask, bounds, best.owners, world_size)
    assert best.received == pytest.approx(np.mean(received / elsewhere))
    dense = mask.to_dense()[0, 0].sum(1).numpy()
    area = np.bincount(np.repeat(best.owners, np.diff(bounds)), dense, world_size)
    assert best.imbalance == pytest.approx(area.max() / area.mean())


@pytest.mark.parametrize("n, world_size, chunk_size", [(1_000, 4, 64), (1_003, 4, 64), (11_021, 7, 100), (960, 3, 32)])
@pytest.mark.parametrize("make", [lambda p: balanced(p).owners, lambda p: peel(p, TOLERANCE)])
def test_every_rank_has_the_same_number_of_chunks_and_one_odd_one(n, world_size, chunk_size, make):
    _, problem = problem_of(builders.causal_document(pack(n, seed=1)), world_size, chunk_size)
    owners = make(problem)
    assert (np.bincount(owners, minlength=world_size) == problem.chunks // world_size).all()
    assert set(np.bincount(owners, problem.odd, world_size)) <= {float(problem.odd.any())}


def test_swaps_balance_what_peeling_left():
    better = 0
    for seed in range(10):
        _, problem = problem_of(builders.causal_document(pack(32_768, seed)), 8, 256)
        start = peel(problem, TOLERANCE)
        end = swap(problem, start)
        load, load_after = (np.bincount(owners, problem.load, 8) for owners in (start, end))
        # A hair of overload may be worth a busy sender less.
        assert load_after.max() <= max(load.max(), load.mean() * (1 + 1.1 * TOLERANCE))
        better += load_after.max() < load.max()
    assert better >= 5


def test_swaps_know_what_each_exchange_saves():
    """The traffic they keep count of is that of counting anew, after every exchange."""
    mask = builders.causal_document(pack(1_000, seed=3)) & builders.sliding_window(1_000, 300)
    bounds, problem = problem_of(mask, 5, 20)
    start = peel(problem, TOLERANCE)
    state = _State(problem, start, *limits(problem, start))
    generator = np.random.default_rng(0)
    done = 0
    for _ in range(60):
        i, j = generator.integers(problem.chunks, size=2)
        if state.owners[i] == state.owners[j]:
            continue
        before = sum(received_by_counting(mask, bounds, state.owners, 5))
        rank = int(state.owners[i])
        mine, theirs = np.array([i]), np.array([j])
        done += state.try_swap(int(i), int(j), 40.0)
        after = received_by_counting(mask, bounds, state.owners, 5)
        assert state.received.tolist() == after
        assert sum(after) - before < 40
        # What a chunk adds when it joins, by moving it alone.
        chunk = int(theirs[0])
        if state.owners[chunk] != rank:
            moved = state.owners.copy()
            moved[chunk] = rank
            now = received_by_counting(mask, bounds, moved, 5)[rank]
            assert state.joining(rank)[chunk] == now - after[rank]
            assert state.joined_by(np.array([chunk]))[rank, 0] == now - after[rank]
        own = int(mine[0])
        left, owner = state.owners.copy(), int(state.owners[own])
        left[own] = (owner + 1) % 5
        assert state.leaving[own] == after[owner] - received_by_counting(mask, bounds, left, 5)[owner]
    assert done >= 5


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(problem_module, "find_spec", lambda name: None)
    problem_module._loops.cache_clear()
    yield
    problem_module._loops.cache_clear()


@pytest.mark.parametrize("world_size, chunk_size", [(8, 200), (7, 100), (32, 128)])
@pytest.mark.parametrize(
    "mask",
    [
        builders.causal_document(pack(32_768, 3)),
        builders.document(pack(30_011, 4)),
        builders.prefix_tree([-1, 0, 1, 1, 0], [9_000, 4_000, 3_000, 5_000, 7_000]),
        builders.causal_document(pack(32_768, 5)) & builders.sliding_window(32_768, 3_000),
    ],
    ids=["documents", "full", "tree", "windows"],
)
def test_compiled_loops_find_what_the_vectorised_search_finds(mask, world_size, chunk_size, request):
    pytest.importorskip("numba")
    _, problem = problem_of(mask, world_size, chunk_size)
    # A second measure that says something else.
    problem = replace(problem, loads=np.concatenate([problem.loads, np.ceil(problem.loads / 2**14) * 2**14]))
    assert compiled(problem) is not None
    found = peel(problem, TOLERANCE)
    better = swap(problem, found)
    received = problem.received(better)
    request.getfixturevalue("without_numba")
    assert compiled(problem) is None
    assert (problem.received(better) == received).all()
    assert (peel(problem, TOLERANCE) == found).all()
    assert (swap(problem, found) == better).all()
    assert (better != found).any()


def test_numba_is_for_large_plans_whatever_was_planned_before():
    pytest.importorskip("numba")
    mask = builders.causal_document(pack(32_768, 3))
    small, large = problem_of(mask, 4, 1_024)[1], problem_of(mask, 8, 200)[1]
    assert compiled(small) is None
    assert compiled(large) is not None
    assert compiled(small) is None


@pytest.mark.parametrize("seed", range(4))
def test_no_layout_is_below_the_floor(seed):
    """Every even assignment of 6 chunks to 3 ranks, by trying them all, receives at least the floor."""
    n, chunk = 60, 10
    mask = builders.causal_document(pack(n, seed)) if seed else builders.causal(n)
    bounds, problem = problem_of(mask, 3, chunk)
    floor, least = problem.floor(tolerance=0.3), np.inf
    for code in range(3**6):
        owners = np.array([code // 3**c % 3 for c in range(6)])
        if (np.bincount(owners, minlength=3) != 2).any():
            continue
        trial = problem.measure(owners)
        if trial.imbalance <= 1.3:
            least = min(least, np.mean(received_by_counting(mask, bounds, owners, 3)) / (n - n / 3))
    assert 0 <= floor <= least + 1e-12
    if seed == 0:
        assert floor > 0.2


def test_plain_orders():
    assert contiguous(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert zigzag(8, 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert contiguous(2, 5).tolist() == [0, 2] and len(zigzag(0, 3)) == 0


def test_dear_traffic_gives_way_to_imbalance_and_no_further_than_the_least_price():
    mask = builders.causal(65_536)
    prices = [problem_of(mask, 8, 512, bandwidth=bandwidth)[1].price for bandwidth in (1e8, 4.5e10, 1e12)]
    assert prices[0] == 5.0 < prices[1] < prices[2]
