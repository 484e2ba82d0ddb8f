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


def assert_exact(mask, key, runs):
    expected = expected_states(mask, *key)
    assert torch.equal(states_of(runs, expected.shape[2]), expected.cpu())
    visited = (expected != SKIPPED).sum(-1)
    assert torch.equal(runs.tiles, visited.int())
    assert torch.equal(runs.order, visited.sort(dim=1, descending=True, stable=True).indices.int())


# Blocks of rows need not be powers of two. Few, because on a GPU each is compiled.
KEYS = (
    [(1, 1, True)],
    [(3, 2, True), (2, 4, False)],
    [(2, 1, False), (6, 8, True)],
    [(4, 4, True), (1, 2, True), (3, 8, False)],
)


@settings(deadline=None, max_examples=40)
@given(raw_masks(), st.sampled_from(KEYS), st.sampled_from([1, 40, 1 << 24]))
def test_runs_are_the_states(raw, keys, states_at_once):
    """One program, several, and one for each block; all of them have several chunks."""
    mask = FlashMask(raw.starts, raw.ends, causal=raw.causal, num_rows=raw.num_rows).to(DEVICE)
    if not mask.num_rows or not mask.num_columns:
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"_MAX_STATES": states_at_once, "_CHUNK": 4, "_AT_ONCE": 2, "_SPAN": 8}.items():
            patch.setattr(schedule, name, size)
        patch.setattr(schedule, "_OWN", 2)
        patch.setattr(schedule, "_COMPARED", 4)
        built = schedule.all_tile_runs(mask, keys)
    for key, runs in zip(keys, built, strict=True):
        assert_exact(mask, key, runs)


@pytest.mark.parametrize("n", [1000, 2500])
def test_long_masks(n):
    """Several programs a kernel and several chunks a block, of columns and of blocks."""
    lengths = [n // 7, n // 3, n - n // 7 - n // 3]
    window = builders.sliding_window(n, n // 5)
    mask = (builders.causal_document(lengths) & window).to(DEVICE)
    keys = [(192, 32, True), (64, 32, False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_CHUNK", 32)
        patch.setattr(schedule, "_COMPARED", 64)
        built = schedule.all_tile_runs(mask, keys)
    for key, runs in zip(keys, built, strict=True):
        assert_exact(mask, key, runs)
    assert (expected_states(mask, *keys[1]) != SKIPPED).float().mean() < 0.5


def test_a_mask_for_each_of_many_heads():
    """Blocks of all groups are numbered through, with gaps; many have as many tiles as others."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 60, (3, 3, 2, 50), generator=generator, dtype=torch.int32)
    ends = starts + torch.randint(0, 40, starts.shape, generator=generator, dtype=torch.int32)
    # Groups that see nothing, and everything.
    starts[0, 1], ends[0, 1], starts[2, 2] = 0, 60, 60
    mask = FlashMask(starts, ends, causal=True, num_rows=60).to(DEVICE)
    keys = [(48, 8, True), (16, 16, False), (24, 16, True)]
    for key, runs in zip(keys, schedule.all_tile_runs(mask, keys), strict=True):
        assert_exact(mask, key, runs)
    assert mask.batch * mask.heads * 2 % 4, "no gap after the first schedule"


# Rows that columns by turns hide, and what tiles of 8 rows and 8 columns then are.
@pytest.mark.parametrize(
    ("intervals", "states"),
    [
        # Each interval alone leaves the rows between them untouched, or hides them all.
        ([(0, 8), (24, 32)], [PARTIAL, FULL, FULL, PARTIAL]),
        ([(0, 16), (16, 32)], [PARTIAL] * 4),
        ([(8, 32), (0, 24)], [PARTIAL, SKIPPED, SKIPPED, PARTIAL]),
        ([(9, 10), (22, 23)], [FULL, PARTIAL, PARTIAL, FULL]),
        # Some columns have none, and the ends of the others do not tell of them.
        ([(0, 32), (0, 0)], [PARTIAL] * 4),
        ([(0, 8), (0, 0)], [PARTIAL, FULL, FULL, FULL]),
    ],
)
def test_what_is_told_from_the_extremes(intervals, states):
    columns = 8
    starts, ends = (torch.tensor([x[side] for x in intervals] * (columns // 2), dtype=torch.int32) for side in (0, 1))
    mask = FlashMask(starts[None, None, None], ends[None, None, None], causal=False, num_rows=32).to(DEVICE)
    rows, column = schedule.all_tile_runs(mask, [(8, 8, True), (8, 8, False)])
    assert states_of(rows, 1).flatten().tolist() == states
    assert states_of(column, 4).flatten().tolist() == states


def test_what_the_diagonal_and_an_interval_hide_together():
    """Neither hides all of the first tile; only counting tells."""
    o = torch.arange(16, dtype=torch.int32)
    starts, ends = torch.where(o < 8, o, 16), torch.where(o < 8, 8, 16)
    mask = FlashMask(starts[None, None, None], ends[None, None, None].int(), causal=True).to(DEVICE)
    for key, runs in zip(keys := [(8, 8, True), (8, 8, False)], schedule.all_tile_runs(mask, keys), strict=True):
        expected = [[SKIPPED, SKIPPED], [FULL, PARTIAL]]
        assert torch.equal(states_of(runs, 2)[0], torch.tensor(expected) if key[2] else torch.tensor(expected).T)


def test_what_is_cached_is_not_built_again():
    mask = builders.causal_document([30, 40]).to(DEVICE)
    first = schedule.tile_runs(mask, 16, 16, by_row=True)
    again, other = schedule.all_tile_runs(mask, [(16, 16, True), (16, 8, False)])
    assert again is first
    assert other.bounds is first.bounds
    assert_exact(mask, (16, 8, False), other)


def test_the_table_of_bounds():
    """Zeros past the last column hide every row; as many rows as TMA's boxes have."""
    window = builders.causal_document([100, 45]) & builders.sliding_window(145, 20)
    starts, ends = torch.randint(0, 145, (2, 1, 2, 3, 145), dtype=torch.int32).sort(0).values
    last = torch.iinfo(torch.int32).max
    for mask, rows in ((window.to(DEVICE), 2), (FlashMask(starts, ends, causal=False).to(DEVICE), 8)):
        bounds = schedule.tile_runs(mask, 16, 16, by_row=True).bounds
        k = mask.num_intervals
        assert bounds.shape == (mask.batch * mask.heads, rows, 256) and bounds.is_contiguous()
        assert bounds.data_ptr() % 16 == 0
        expected = torch.zeros_like(bounds)
        expected[:, 0 : 2 * k : 2, :145] = mask.starts.flatten(0, 1)
        expected[:, 1 : 2 * k : 2, :145] = last - mask.ends.flatten(0, 1)
        assert torch.equal(bounds, expected)


def test_without_room_everything_between_is_visited_as_partial(monkeypatch):
    """Column-blocks by turns visible and hidden: more runs than fit, and no tile is lost."""
    n, block = 128, 4
    hidden = (torch.arange(n) // block % 2 == 1).int()[None, None, None]
    mask = FlashMask(torch.zeros_like(hidden), n * hidden, causal=False).to(DEVICE)
    exact = schedule.tile_runs(mask, block, block, by_row=True)
    assert exact.tiles.eq(n // block // 2).all()
    mask.cache.clear()
    blocks = n // block
    # Room for two blocks' runs in the pool, beside the one that each block has.
    of = schedule._Plan.of
    monkeypatch.setattr(
        schedule._Plan, "of", staticmethod(lambda *args: of(*args)._replace(room=blocks + 2 * blocks // 2 + 1))
    )
    runs = schedule.tile_runs(mask, block, block, by_row=True)
    states = states_of(runs, blocks)[0]
    expected = expected_states(mask, block, block, True)[0].cpu()
    kept = (states == expected).all(-1)
    assert kept.sum() == 2
    assert sorted(set(runs.tiles.flatten().tolist())) == [blocks // 2, blocks - 1]
    # Between the first and the last visible tile.
    assert (states[~kept][:, : blocks - 1] == PARTIAL).all() and (states[~kept][:, -1] == SKIPPED).all()


@pytest.mark.parametrize("together", [True, False])
def test_memory_at_a_million_tokens(together):
    """At most 64 MB a mask head, the schedules of a training step and the intervals that they read, for masks of up to
    two; also if the forward's was built before it was known that a backward follows."""
    n = 1 << 20
    for d, intervals, causal in itertools.product((64, 128), range(3), (False, True)):
        starts = torch.empty((1, 1, intervals, n), dtype=torch.int32, device="meta")
        chosen = choose((9, 0), 2, d, intervals, causal, n)
        needed = list(dict.fromkeys([(*chosen.forward[:2], True), (*chosen.query[:2], True), (*chosen.key[:2], False)]))
        builds = [needed] if together else [needed[:1], needed[1:]]
        sizes = [schedule._Plan.of(starts, n, keys, i == 0).size for i, keys in enumerate(builds)]
        assert 4 * sum(sizes) <= 64e6


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_visit(shape):
    rows, columns = shape
    blank = torch.zeros((1, 1, 0, columns), dtype=torch.int32, device=DEVICE)
    mask = FlashMask(blank, blank, causal=False, num_rows=rows)
    for by_row in (True, False):
        assert schedule.tile_runs(mask, 4, 4, by_row=by_row).tiles.sum() == 0
