"""Paddle's vectors: what 1, 2 and 4 of them mean, and that the fewest come back."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.mask import causal_document, document, full, global_sliding_window, sliding_window
from tests.mask.oracle import INT32
from tests.properties import examples

FORMS = [(True, 1), (True, 2), (False, 2), (False, 4)]


def dense_of_vectors(indices, causal, n_q):
    """Bool `[B, H, N_q, N_k]` from the words of the table."""
    b, h, n_k, vectors = indices.shape
    values = indices.tolist()
    visible = torch.ones(b, h, n_q, n_k, dtype=torch.bool)
    for i, j, r, c in itertools.product(range(b), range(h), range(n_q), range(n_k)):
        v = values[i][j][c]
        if causal:
            hidden = v[0] <= r < (v[1] if vectors == 2 else n_q) or r < c - (n_k - n_q)
        elif vectors == 2:
            hidden = v[0] <= r or r < v[1]
        else:
            hidden = v[0] <= r < v[1] or v[2] <= r < v[3]
        visible[i, j, r, c] = not hidden
    return visible


@st.composite
def vectors(draw):
    causal, count = draw(st.sampled_from(FORMS))
    b, h = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    n_q, n_k = draw(st.integers(0, 6)), draw(st.integers(0, 5))
    size = b * h * n_k * count
    bound = st.one_of(st.integers(-1, n_q + 1), st.sampled_from([0, n_q, *INT32]))
    values = draw(st.lists(bound, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.int32).view(b, h, n_k, count), causal, n_q


def says(visible, causal, count):
    """Whether some `count` vectors a column give this mask, by trying all of them."""
    n_q = visible.shape[2]
    options = torch.tensor(list(itertools.product(range(n_q + 1), repeat=count)), dtype=torch.int32)
    for i, j, c in itertools.product(range(visible.shape[0]), range(visible.shape[1]), range(visible.shape[3])):
        column = visible[i, j, :, c]
        # The diagonal of this column alone, as rows of a mask that ends with it.
        offset = max(0, c - (visible.shape[3] - n_q)) if causal else 0
        rows = torch.arange(n_q)
        hidden = rows >= options[:, 0, None]
        if count == 2:
            hidden = hidden & (rows < options[:, 1, None]) if causal else hidden | (rows < options[:, 1, None])
        tried = ~(hidden | (rows < offset))
        if not bool((tried == column).all(-1).any()):
            return False
    return True


@settings(max_examples=examples(400))
@given(vectors())
def test_meaning_round_trip_and_fewest(case):
    indices, causal, n_q = case
    mask = FlashMask.from_startend_row_indices(indices, causal=causal, num_rows=n_q)
    expected = dense_of_vectors(indices, causal, n_q)
    assert torch.equal(mask.to_dense(), expected)

    back = mask.to_startend_row_indices()
    assert back.dtype == torch.int32 and back.shape[:3] == indices.shape[:3]
    assert (causal, back.shape[3]) in FORMS
    assert torch.equal(dense_of_vectors(back, causal, n_q), expected)
    again = FlashMask.from_startend_row_indices(back, causal=causal, num_rows=n_q)
    assert again.fingerprint() == mask.fingerprint()
    fewest = FORMS[0 if causal else 2][1]
    assert back.shape[3] == (fewest if says(expected, causal, fewest) else 2 * fewest)
    if back.shape[3] == 4:
        lts, lte, uts, ute = back.unbind(-1)
        assert bool(((ute <= lts) | (uts == ute) | (lts == lte)).all()), "the upper interval lies above the lower one"


def test_rows_default_to_columns():
    indices = torch.tensor([2, 3, 4, 4], dtype=torch.int32).view(1, 1, 4, 1)
    mask = FlashMask.from_startend_row_indices(indices, causal=True)
    assert mask.num_rows == 4
    assert mask.starts.flatten().tolist() == [2, 3, 4, 4]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # As published for these cases: document ends; document ends and starts; j + W; a band and global tokens.
        (causal_document([3, 2]), [[3], [3], [3], [5], [5]]),
        (document([3, 2]), [[3, 0], [3, 0], [3, 0], [5, 3], [5, 3]]),
        (sliding_window(5, 2), [[2], [3], [4], [5], [5]]),
        (full(2), [[2, 0], [2, 0]]),
        (
            global_sliding_window(5, 1, 1),
            [[5, 5, 0, 0], [3, 5, 0, 0], [4, 5, 0, 0], [5, 5, 1, 2], [5, 5, 1, 3]],
        ),
    ],
)
def test_published_vectors(mask, expected):
    assert mask.to_startend_row_indices()[0, 0].tolist() == expected


def test_a_lone_interval_is_lower_iff_it_starts_on_or_below_the_diagonal():
    starts = torch.tensor([1, 1, 1, 1], dtype=torch.int32).view(1, 1, 1, 4)
    mask = FlashMask(starts, starts + 1, causal=False)
    assert mask.to_startend_row_indices()[0, 0].tolist() == [[1, 2, 0, 0], [1, 2, 0, 0], [4, 4, 1, 2], [4, 4, 1, 2]]


@pytest.mark.parametrize(("causal", "limit"), [(True, "1 masked interval a column"), (False, "2 masked intervals a")])
def test_too_many_intervals_name_the_column(causal, limit):
    starts = torch.tensor([1, 3, 5], dtype=torch.int32).view(1, 1, 3, 1).repeat(1, 2, 1, 8)
    ends = torch.zeros_like(starts)
    ends[0, 1, :, 1] = starts[0, 1, :, 1] + 1
    mask = FlashMask(starts, ends, causal=causal)
    message = f"at most {limit}.*causal={causal}, but column 1 \\(batch 0, head 1\\) has 3. Keep it as a FlashMask"
    with pytest.raises(ValueError, match=message):
        mask.to_startend_row_indices()


_GOOD = torch.zeros(1, 1, 4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([1], {"causal": True}, "startend_row_indices must be an int32 tensor [B, H_mask, N_k, V], got list"),
        (_GOOD.long(), {"causal": True}, "must be int32, got torch.int64. Convert it with .to(torch.int32)"),
        (_GOOD[0], {"causal": True}, "must have shape [B, H_mask, N_k, V], got [1, 4, 2]"),
        (_GOOD, {"causal": None}, "causal must be True or False, got None"),
        (_GOOD, {"causal": True, "num_rows": -1}, "num_rows must be an integer in [0, 2**31), got -1"),
        (_GOOD, {"causal": True, "num_rows": 1.0}, "num_rows must be an integer in [0, 2**31), got 1.0"),
        (
            _GOOD[..., :1],
            {"causal": False},
            "2 (LTS, UTE) or 4 (LTS, LTE, UTS, UTE) vectors a column, got 1. With causal=T",
        ),
        (
            _GOOD.repeat(1, 1, 1, 2),
            {"causal": True},
            "1 (LTS) or 2 (LTS, LTE) vectors a column, got 4. With causal=False",
        ),
        (_GOOD.repeat(1, 1, 1, 2)[..., :3], {"causal": False}, "vectors a column, got 3."),
        (_GOOD[..., :0], {"causal": True}, "vectors a column, got 0."),
    ],
)
def test_refuses(indices, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FlashMask.from_startend_row_indices(indices, **options)
