"""The way in which the portable kernels walk runs: every tile in its state, and runs without a gap in one loop."""

import pytest
import torch
import triton
import triton.language as tl

from fm_longctx import FlashMask
from fm_longctx.kernels.primitives import read_runs
from fm_longctx.kernels.schedule import tile_runs
from fm_longctx.mask import builders
from fm_longctx.mask.tiles import FULL, PARTIAL
from tests.attention.oracle import DEVICE
from tests.kernels.test_schedule import expected_states


@triton.jit
def walk_kernel(
    p_runs, p_first, p_count, p_states, p_loops, others,
    JOINED: tl.constexpr, PARTIAL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """States of the tiles that block program_id(0) visits, and in how many loops it does."""
    block = tl.program_id(0)
    run = tl.load(p_first + block)
    stop = run + tl.load(p_count + block)
    loops = 0
    while run < stop:
        begin, full, rest, end, run = read_runs(p_runs, run, stop, JOINED)
        loops += 1
        for tile in range(begin, end):
            partial = (tile < full) | (tile >= rest) if JOINED else full > 0
            p_state = p_states + block * others + tile
            # A tile that is visited twice is in no state.
            tl.store(p_state, tl.load(p_state) * 8 + tl.where(partial, PARTIAL, FULL))
    tl.store(p_loops + block, loops)


def walk(mask, block_m, block_n, by_row, joined):
    """int `[blocks, others]` and `[blocks]`, of a mask with one head."""
    runs = tile_runs(mask, block_m, block_n, by_row=by_row)
    expected = expected_states(mask, block_m, block_n, by_row)[0]
    blocks, others = expected.shape
    states = torch.zeros((blocks, others), dtype=torch.int32, device=DEVICE)
    loops = torch.zeros(blocks, dtype=torch.int32, device=DEVICE)
    walk_kernel[(blocks,)](
        runs.runs, runs.first, runs.run_count, states, loops, others, JOINED=joined, PARTIAL=PARTIAL, FULL=FULL
    )
    assert torch.equal(states.long().cpu(), expected.cpu())
    return loops


def by_turns(n, width):
    """Columns that every row sees, then columns that none does."""
    hidden = (torch.arange(n) // width % 2 == 1).int()[None, None, None]
    return FlashMask(torch.zeros_like(hidden), n * hidden, causal=False)


N = 160
# Each with the most loops that any block of rows, and of columns, needs.
MASKS = {
    "full": (builders.full(N), 1, 1),
    "causal": (builders.causal(N - 3), 1, 1),
    "documents": (builders.document([60, 21, N - 81]), 1, 1),
    "causal documents": (builders.causal_document([60, 21, N - 81]), 1, 1),
    "window": (builders.sliding_window(N, 50), 1, 1),
    "window and first columns": (builders.global_sliding_window(N, 5, 30), 2, 2),
    "columns by turns": (by_turns(N, 16), 5, 1),
    "evicted": (builders.random_eviction(N, seed=1), None, None),
}


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_every_tile_once_in_few_loops(name, by_row):
    mask, rows, columns = MASKS[name]
    loops = walk(mask.to(DEVICE), 16, 8, by_row, True)
    most = rows if by_row else columns
    if most is not None:
        assert int(loops.max()) == most


def test_a_loop_for_each_run():
    mask = builders.sliding_window(N, 50).to(DEVICE)
    assert int(walk(mask, 16, 8, True, False).max()) == 3
