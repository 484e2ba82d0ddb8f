"""Random adversarial masks: whatever the intervals are, the op computes what their definition says."""

import math
from typing import NamedTuple

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

from fm_longctx import FlashMask, flashmask_attention
from tests.attention.oracle import DEVICE, check, random_inputs
from tests.mask.oracle import INT32, Raw, dense_of_intervals
from tests.properties import examples


class Case(NamedTuple):
    raw: Raw
    batch: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    seed: int
    loss_on_out: bool


@st.composite
def columns_of_intervals(draw, rows: int, columns: int, slots: int):
    """(starts, ends) `[columns][slots]` in no order: any bounds, in runs of equal columns, so that some tiles are
    skipped or full."""
    near = st.integers(-3, rows + 3)
    special = [(0, rows), (0, rows // 2), (rows // 2, rows), INT32, INT32[::-1], (rows, rows), (rows - 1, rows), (0, 1)]
    pair = st.one_of(st.tuples(near, near), st.sampled_from(special))
    distinct = draw(st.lists(st.lists(pair, min_size=slots, max_size=slots), min_size=1, max_size=5))
    run = draw(st.integers(1, 40))
    return [distinct[(j // run) % len(distinct)] for j in range(columns)]


@st.composite
def attention_cases(draw, max_length: int, max_programs: int):
    rows, columns = draw(st.integers(1, max_length)), draw(st.integers(1, max_length))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)]))
    batch = draw(st.integers(1, min(2, max_programs // heads)))
    mask_batch, mask_heads = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads, heads]))
    slots = draw(st.integers(0, 4))
    bounds = [draw(columns_of_intervals(rows, columns, slots)) for _ in range(mask_batch * mask_heads)]
    both = torch.tensor(bounds, dtype=torch.int32).view(mask_batch, mask_heads, columns, slots, 2).transpose(2, 3)
    return Case(
        raw=Raw(both[..., 0].contiguous(), both[..., 1].contiguous(), draw(st.booleans()), rows),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        seed=draw(st.integers(0, 99)),
        loss_on_out=draw(st.booleans()),
    )


def check_case(case: Case, backend: str) -> None:
    raw = case.raw
    mask = FlashMask(raw.starts, raw.ends, causal=raw.causal, num_rows=raw.num_rows).to(DEVICE)
    q, k, v = random_inputs(
        batch=case.batch,
        rows=raw.num_rows,
        columns=raw.starts.shape[-1],
        heads=case.heads,
        kv_heads=case.kv_heads,
        d=16,
        dtype=case.dtype,
        seed=case.seed,
    )

    def attend(q, k, v):
        return flashmask_attention(q, k, v, mask, return_lse=True, backend=backend)

    # Every loss has the LSE in it; of some it is all. Products of D = 16 normal numbers are about 4.
    visible = dense_of_intervals(raw).to(DEVICE)
    check(attend, q, k, v, visible, 1 / math.sqrt(16), with_out=case.loss_on_out, magnitude=4.0)


# The tiles of tests/attention/conftest.py are the same for every example.
_shared = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=examples(200), **_shared)
@given(attention_cases(max_length=70, max_programs=8))
def test_reference(case):
    check_case(case, "reference")


# Interpreted, a case takes as long as it has programs and tiles: fewer and smaller ones.
@settings(max_examples=examples(25), **_shared)
@given(attention_cases(max_length=40, max_programs=4))
def test_triton(case):
    check_case(case, "triton")
