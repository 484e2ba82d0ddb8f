"""The paper's tile rule is sound, weaker than the exact one where it should be, and its runs are its states."""

import pytest
import torch

from benchmarks.cases import cases
from benchmarks.minmax import as_runs, min_max_states
from fm_longctx.mask import FlashMask
from fm_longctx.mask.tiles import FULL, PARTIAL, SKIPPED, tile_states

N = 203


@pytest.mark.parametrize("name", [case.name for case in cases(N)])
def test_rule_is_sound(name):
    mask = next(case.mask for case in cases(N, seed=1) if case.name == name)
    exact, rule = tile_states(mask, 16, 32), min_max_states(mask, 16, 32)
    assert exact[rule == SKIPPED].eq(SKIPPED).all()
    assert exact[rule == FULL].eq(FULL).all()
    assert (rule != SKIPPED).sum() < rule.numel() or name == "full"


def test_rule_misses_what_an_interval_and_the_diagonal_hide_together():
    column = torch.arange(32)
    # Rows 8 to 15: hidden from columns before 16 by the interval, from the others by the diagonal.
    starts = torch.where(column < 16, 8, 32)[None, None, :, None].int()
    mask = FlashMask.from_startend_row_indices(starts, causal=True, num_rows=32)
    assert tile_states(mask, 8, 32).flatten().tolist() == [PARTIAL, SKIPPED, PARTIAL, PARTIAL]
    assert min_max_states(mask, 8, 32).flatten().tolist() == [PARTIAL] * 4
    # Canonical form cuts intervals at the diagonal; the rule takes them as they were given.
    assert min_max_states(mask, 8, 16).eq(SKIPPED).tolist() == tile_states(mask, 8, 16).eq(SKIPPED).tolist()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("name", ["causal_document", "global_sliding_window", "random_eviction"])
def test_runs_are_the_states(name, by_row):
    mask = next(case.mask for case in cases(N) if case.name == name)
    states = min_max_states(mask, 16, 32)
    runs = as_runs(states, mask, by_row=by_row)
    found = torch.full_like(states[0, 0] if by_row else states[0, 0].T, SKIPPED)
    for block in range(found.shape[0]):
        run = int(runs.first[0, block])
        for word, end in runs.runs[run : run + int(runs.run_count[0, block])].tolist():
            found[block, word >> 1 : end] = PARTIAL if word & 1 else FULL
    assert torch.equal(found, states[0, 0] if by_row else states[0, 0].T)
    assert torch.equal(runs.tiles[0], found.ne(SKIPPED).sum(1).int())
    assert runs.tiles[0][runs.order[0].long()].diff().le(0).all()
