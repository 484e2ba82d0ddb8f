"""Assignments: what they promise about chunks, and that their estimate of traffic is exact where it claims so."""

import numpy as np
import pytest
import torch

from benchmarks.packs import pack
from fm_longctx import FlashMask
from fm_longctx.context_parallel import assign as module
from fm_longctx.context_parallel.assign import assign
from fm_longctx.context_parallel.coverage import chunk_tables, segments
from fm_longctx.context_parallel.plan import chunk_grid
from fm_longctx.mask import builders


def chunks_of(mask, world_size, chunk_size):
    bounds, odd = chunk_grid(mask.num_rows, world_size, chunk_size)
    area, visible = chunk_tables(segments(mask, bounds), bounds)
    return bounds, odd, assign(area.sum(1), visible, np.diff(bounds), odd, world_size)


def received(mask, bounds, owners, world_size):
    """Received over all-gathered keys, mean over ranks, from the dense mask."""
    source = torch.from_numpy(np.repeat(owners, np.diff(bounds)))
    fractions = []
    for rank in range(world_size):
        seen = mask.to_dense()[0, 0, source == rank].any(0)
        fractions.append(float((seen & (source != rank)).sum() / (source != rank).sum()))
    return sum(fractions) / world_size


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
    bounds, _, best = chunks_of(mask, world_size, chunk_size)
    assert best.received == pytest.approx(received(mask, bounds, best.owners, world_size))
    dense = mask.to_dense()[0, 0].sum(1).numpy()
    area = np.bincount(np.repeat(best.owners, np.diff(bounds)), dense, world_size)
    assert best.imbalance == pytest.approx(area.max() / area.mean())


@pytest.mark.parametrize("n, world_size, chunk_size", [(1_000, 4, 64), (1_003, 4, 64), (11_021, 7, 100), (960, 3, 32)])
def test_every_rank_has_the_same_number_of_chunks_and_one_odd_one(n, world_size, chunk_size):
    _, odd, best = chunks_of(builders.causal_document(pack(n, seed=1)), world_size, chunk_size)
    counts = np.bincount(best.owners, minlength=world_size)
    assert (counts == len(odd) // world_size).all()
    assert set(np.bincount(best.owners, odd, world_size)) <= {float(odd.any())}


def test_swaps_balance_what_greedy_left():
    better = 0
    for seed in range(10):
        mask = builders.causal_document(pack(32_768, seed))
        bounds, odd = chunk_grid(mask.num_rows, 8, 512)
        area, visible = chunk_tables(segments(mask, bounds), bounds)
        area, remote = area.sum(1), visible.astype(float)
        np.fill_diagonal(remote, 0.0)
        start = module._greedy(area, remote, odd, 8)
        end = module._swap(area, remote, odd, start, 8, mask.num_rows)
        load, load_after = (np.bincount(owners, area, 8) for owners in (start, end))
        assert load_after.max() <= max(load.max(), load.mean() * (1 + module.TOLERANCE))
        better += load_after.max() < load.max()
    assert better >= 8
