"""Random adversarial masks: whatever the intervals are, the op computes what their definition says."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fm_longctx import FlashMask, flashmask_attention
from tests.attention.oracle import DEVICE, check, random_inputs


@st.composite
def interval_masks(draw):
    """(starts, ends) `[K][columns]` with bounds anywhere, rows, columns, causal."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    bound = st.integers(-3, rows + 3)
    column = st.lists(st.tuples(bound, bound), max_size=4)
    distinct = draw(st.lists(column, min_size=1, max_size=5))
    run = draw(st.integers(1, 40))  # runs of equal columns, so that some tiles are skipped or full
    chosen = [distinct[(j // run) % len(distinct)] for j in range(columns)]
    return chosen, rows, columns, draw(st.booleans())


@pytest.mark.parametrize("backend", ["reference", "triton"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(interval_masks())
def test_random_intervals(backend, case):
    columns_of_intervals, rows, columns, causal = case
    visible = torch.ones(rows, columns, dtype=torch.bool)
    most = max(len(intervals) for intervals in columns_of_intervals)
    starts = torch.zeros(1, 1, most, columns, dtype=torch.int32)
    ends = torch.zeros_like(starts)
    for j, intervals in enumerate(columns_of_intervals):
        for i, (start, end) in enumerate(intervals):
            starts[0, 0, i, j], ends[0, 0, i, j] = start, end
            for r in range(rows):
                if start <= r < end:
                    visible[r, j] = False
        if causal:
            for r in range(rows):
                if r < j - (columns - rows):
                    visible[r, j] = False
    mask = FlashMask(starts, ends, causal=causal, num_rows=rows).to(DEVICE)
    q, k, v = random_inputs(rows=rows, columns=columns, heads=1, d=16)

    def attend(q, k, v):
        return flashmask_attention(q, k, v, mask, return_lse=True, backend=backend)

    check(attend, q, k, v, visible[None, None].to(DEVICE), 1 / math.sqrt(16))
