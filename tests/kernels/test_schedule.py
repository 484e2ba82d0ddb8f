"""Schedules against states counted in plain torch, whatever the mask; and what happens when runs find no room."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.kernels import schedule
from fm_longctx.kernels.blocks import choose
from fm_longctx.mask import builders
from fm_longctx.mask.tiles import FULL, PARTIAL, SKIPPED, tile_states
from tests.attention.oracle import DEVICE
from tests.mask.oracle import raw_masks


def states_of(runs, others):
    """Back from runs to states `[groups, blocks, others]`, walking them as their definition says."""
    groups, blocks = runs.first.shape
    states = torch.full((groups, blocks, others), SKIPPED)
    for group in range(groups):
        for block in range(blocks):
            first, count = int(runs.first[group, block]), int(runs.run_count[group, block])
            last_end = -1
            for word, end in runs.runs[first : first + count].tolist():
                begin, state = word >> 1, PARTIAL if word & 1 else FULL
                assert last_end <= begin < end <= others
                states[group, block, begin:end] = state
                last_end = end
    return states


def expected_states(mask, block_m, block_n, by_row):
    states = tile_states(mask, block_m, block_n).flatten(0, 1).long()
    if mask.num_columns % block_n:
        states[..., -1][states[..., -1] == FULL] = PARTIAL
    return states if by_row else states.transpose(1, 2)


@pytest.mark.parametrize("by_row", [True, False])
@settings(deadline=None, max_examples=40)
@given(raw_masks(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 7, 1 << 24]))
def test_runs_are_the_states(by_row, raw, block_m, block_n, states_at_once):
    mask = FlashMask(raw.starts, raw.ends, causal=raw.causal, num_rows=raw.num_rows).to(DEVICE)
    if not mask.num_rows or not mask.num_columns:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_MAX_STATES", states_at_once)
        patch.setattr(schedule, "_CHUNK", 4)
        runs = schedule.tile_runs(mask, block_m, block_n, by_row=by_row)
    expected = expected_states(mask, block_m, block_n, by_row)
    assert torch.equal(states_of(runs, expected.shape[2]), expected.cpu())
    visited = (expected != SKIPPED).sum(-1)
    assert torch.equal(runs.tiles, visited.int())
    for order, counts in zip(runs.order.long(), visited, strict=True):
        assert torch.equal(order.sort().values, torch.arange(len(order), device=order.device))
        assert (counts[order].diff() <= 0).all()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("n", [1000, 4096])
def test_long_masks(by_row, n):
    """Several programs a kernel and several chunks a block."""
    lengths = [n // 7, n // 3, n - n // 7 - n // 3]
    window = builders.sliding_window(n, n // 5)
    mask = (builders.causal_document(lengths) & window).to(DEVICE)
    runs = schedule.tile_runs(mask, 64, 32, by_row=by_row)
    expected = expected_states(mask, 64, 32, by_row)
    assert torch.equal(states_of(runs, expected.shape[2]), expected.cpu())
    assert (expected != SKIPPED).float().mean() < 0.5


def test_without_room_everything_between_is_visited_as_partial(monkeypatch):
    """Column-blocks by turns visible and hidden: more runs than fit, and no tile is lost."""
    n, block = 128, 4
    hidden = (torch.arange(n) // block % 2 == 1).int()[None, None, None]
    mask = FlashMask(torch.zeros_like(hidden), n * hidden, causal=False).to(DEVICE)
    sizes = schedule._sizes
    exact = schedule.tile_runs(mask, block, block, by_row=True)
    assert exact.tiles.eq(n // block // 2).all()
    mask.cache.clear()
    blocks = n // block
    # Room for two blocks' runs in the pool, beside the one that each block has.
    monkeypatch.setattr(schedule, "_sizes", lambda *args: (*sizes(*args)[:3], blocks + 2 * blocks // 2 + 1))
    runs = schedule.tile_runs(mask, block, block, by_row=True)
    states = states_of(runs, blocks)[0]
    expected = expected_states(mask, block, block, True)[0].cpu()
    kept = (states == expected).all(-1)
    assert kept.sum() == 2
    # Between the first and the last visible tile.
    assert (states[~kept][:, : blocks - 1] == PARTIAL).all() and (states[~kept][:, -1] == SKIPPED).all()


def test_memory_at_a_million_tokens():
    """At most 64 MB a mask head, the three schedules of a training step and the intervals that they share, for masks of
    up to two."""
    n = 1 << 20
    starts = torch.empty((1, 1, 1, n), dtype=torch.int32, device="meta")
    for d, intervals, causal in itertools.product((64, 128), range(3), (False, True)):
        chosen = choose((9, 0), 2, d, intervals, causal, n)
        needed = {(chosen.forward[:2], True), (chosen.query[:2], True), (chosen.key[:2], False)}
        total = 4 * max(2, 2 * intervals) * n
        for (block_m, block_n), by_row in needed:
            groups, blocks, _, room = schedule._sizes(starts, n, block_m, block_n, by_row)
            total += 4 * (2 * room + 4 * groups * blocks)
        assert total <= 64e6


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_visit(shape):
    rows, columns = shape
    blank = torch.zeros((1, 1, 0, columns), dtype=torch.int32, device=DEVICE)
    mask = FlashMask(blank, blank, causal=False, num_rows=rows)
    for by_row in (True, False):
        assert schedule.tile_runs(mask, 4, 4, by_row=by_row).tiles.sum() == 0
