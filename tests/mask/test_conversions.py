"""Dense matrices, packed lengths and positions, each against its own words."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from tests.mask.oracle import dense_of_words, index_of_part, runs
from tests.properties import examples

lengths_lists = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@st.composite
def dense_masks(draw):
    b, h, n_q, n_k = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 8), st.integers(0, 6)))
    count = b * h * n_q * n_k
    flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return torch.tensor(flags, dtype=torch.bool).view(b, h, n_q, n_k)


@settings(max_examples=examples(300))
@given(dense_masks())
def test_from_dense_round_trip_with_fewest_intervals(visible):
    mask = FlashMask.from_dense(visible)
    assert torch.equal(mask.to_dense(), visible)
    b, h, _, n_k = visible.shape
    needed = {
        (i, j, c): runs([not v for v in visible[i, j, :, c].tolist()])
        for i, j, c in itertools.product(range(b), range(h), range(n_k))
    }
    most = max(needed.values(), default=0)
    assert mask.num_intervals == most
    assert mask.causal is False
    if most:
        i, j, c = next(where for where, count in needed.items() if count == most)
        with pytest.raises(ValueError, match=f"max_intervals={most - 1}. Pass max_intervals={most}") as error:
            FlashMask.from_dense(visible, max_intervals=most - 1)
        assert f"column {c} (batch {i}, head {j}) has {most} masked intervals" in str(error.value)


def test_from_dense_refuses_more_than_four_unless_told():
    visible = (torch.arange(12) % 2 == 0)[:, None].expand(12, 3)
    with pytest.raises(ValueError, match=re.escape("column 0 (batch 0, head 0) has 6 masked intervals")):
        FlashMask.from_dense(visible)
    assert torch.equal(FlashMask.from_dense(visible, max_intervals=6).to_dense()[0, 0], visible)


@pytest.mark.parametrize(
    ("visible", "options", "message"),
    [
        (torch.ones(3, 3), {}, r"visible must be bool .* got torch.float32 \[3, 3\]"),
        (torch.ones(3, 3, 3, dtype=torch.bool), {}, r"visible must be bool .* got torch.bool \[3, 3, 3\]"),
        (torch.ones(3, 3, dtype=torch.bool), {"max_intervals": -1}, "max_intervals must be >= 0, got -1"),
    ],
)
def test_from_dense_refuses(visible, options, message):
    with pytest.raises(ValueError, match=message):
        FlashMask.from_dense(visible, **options)


@settings(max_examples=examples(150))
@given(lengths_lists, st.booleans())
def test_packed_documents(lengths, causal):
    part = index_of_part(lengths)
    n = len(part)
    expected = dense_of_words(n, n, lambda r, c: part[r] == part[c] and (not causal or c <= r))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    positions = torch.tensor([i for length in lengths for i in range(length)], dtype=torch.int64)
    for mask in (
        FlashMask.from_lengths(lengths, causal=causal),
        FlashMask.from_cu_seqlens(bounds, causal=causal),
        FlashMask.from_cu_seqlens(bounds.int(), causal=causal),
        FlashMask.from_position_ids(positions, causal=causal),
        FlashMask.from_position_ids(positions.int()[None], causal=causal),
    ):
        assert torch.equal(mask.to_dense()[0, 0], expected)
        assert mask.causal == causal


@settings(max_examples=examples(60))
@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_position_ids_of_a_batch(batch, n, data):
    # Any positions, not only those that restart at 0: a document starts wherever they do not rise by one.
    positions = [data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in range(batch)]
    expected = []
    for row in positions:
        part = list(itertools.accumulate([0, *(int(b != a + 1) for a, b in itertools.pairwise(row))]))
        expected.append(dense_of_words(n, n, lambda r, c, part=part: part[r] == part[c] and c <= r))
    mask = FlashMask.from_position_ids(torch.tensor(positions))
    assert torch.equal(mask.to_dense()[:, 0], torch.stack(expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlashMask.from_lengths([]), "lengths must be a non-empty sequence of integers >= 0"),
        (lambda: FlashMask.from_lengths([3, -1]), r"lengths must be .* got \[3, -1\]"),
        (lambda: FlashMask.from_lengths([3, 1.5]), "lengths must be"),
        (lambda: FlashMask.from_lengths([True]), "lengths must be"),
        (lambda: FlashMask.from_cu_seqlens(torch.tensor([1, 3])), "cu_seqlens must start at 0 and never fall"),
        (lambda: FlashMask.from_cu_seqlens(torch.tensor([0, 3, 2])), "cu_seqlens must start at 0 and never fall"),
        (lambda: FlashMask.from_cu_seqlens(torch.tensor([0.0, 3.0])), "cu_seqlens must be a 1-D int32 or int64"),
        (lambda: FlashMask.from_cu_seqlens(torch.tensor([0])), "at least two entries"),
        (lambda: FlashMask.from_cu_seqlens(torch.tensor([[0, 3]])), "cu_seqlens must be a 1-D"),
        (lambda: FlashMask.from_position_ids(torch.tensor([0.0])), "position_ids must be an int32 or int64 tensor"),
        (lambda: FlashMask.from_position_ids(torch.zeros(1, 1, 1, dtype=torch.int64)), r"\[N\] or \[B, N\]"),
    ],
)
def test_packed_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
