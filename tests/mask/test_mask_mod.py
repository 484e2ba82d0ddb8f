"""Masks from FlexAttention-style functions, against the function called score by score."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, create_mask, noop_mask, or_masks
from torch.utils._python_dispatch import TorchDispatchMode

from fm_longctx import FlashMask
from fm_longctx.mask import builders
from fm_longctx.mask.mask_mod import _TensorsAsIndices
from tests.mask.oracle import index_of_part, runs
from tests.properties import examples

LENGTHS = [7, 1, 20, 0, 13, 9]
PART = torch.tensor(index_of_part(LENGTHS))
N = len(PART)
PREFIX = torch.tensor([3, 0, 11, 0, 13, 2])
FIRST = torch.tensor([0, *itertools.accumulate(LENGTHS)])


def full(b, h, q_idx, kv_idx):
    return torch.ones((), dtype=torch.bool)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 8)


def lambda_window(b, h, q_idx, kv_idx):
    return causal(b, h, q_idx, kv_idx) & ((kv_idx < 3) | (q_idx - kv_idx < 8))


def document(b, h, q_idx, kv_idx):
    return PART[q_idx] == PART[kv_idx]


def prefix_lm(b, h, q_idx, kv_idx):
    before = kv_idx - FIRST[PART[kv_idx]] < PREFIX[PART[kv_idx]]
    return (PART[q_idx] == PART[kv_idx]) & ((q_idx >= kv_idx) | before)


NAMED = {
    "full": (full, builders.full(N)),
    "noop_mask": (noop_mask, builders.full(N)),
    "causal": (causal, builders.causal(N)),
    "window": (window, builders.sliding_window(N, 8)),
    "lambda": (lambda_window, builders.lambda_window(N, 3, 8)),
    "document": (document, builders.document(LENGTHS)),
    "causal_document": (and_masks(causal, document), builders.causal_document(LENGTHS)),
    "or_masks": (or_masks(causal, lambda b, h, q, kv: kv < 12), builders.prefix_lm_causal(N, 12)),
    "prefix_lm": (prefix_lm, builders.prefix_lm_document(LENGTHS, PREFIX.tolist())),
}


def score_by_score(function, batch, heads, num_rows, num_columns):
    scalars = [[torch.tensor(i) for i in range(n)] for n in (batch, heads, num_rows, num_columns)]
    flags = [bool(function(*index)) for index in itertools.product(*scalars)]
    return torch.tensor(flags, dtype=torch.bool).view(batch, heads, num_rows, num_columns)


def fewest_intervals(visible):
    columns = visible.transpose(2, 3).flatten(0, 2)
    return max((runs([not v for v in column]) for column in columns.tolist()), default=0)


@pytest.mark.parametrize("block", [1, 7, N - 1, N, 1024])
@pytest.mark.parametrize("name", NAMED)
def test_equals_the_builder(name, block):
    function, built = NAMED[name]
    mask = FlashMask.from_mask_mod(function, num_rows=N, num_columns=N, block=block)
    assert torch.equal(mask.to_dense(), built.to_dense())
    assert mask.causal is False
    assert mask.num_intervals == fewest_intervals(built.to_dense())


@pytest.mark.parametrize("name", NAMED)
def test_equals_what_flex_attention_sees(name):
    function, _ = NAMED[name]
    seen = create_mask(function, 1, 1, N, N, device="cpu")
    assert torch.equal(FlashMask.from_mask_mod(function, num_rows=N, num_columns=N).to_dense(), seen)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (1, 9), (9, 1), (6, 23), (23, 6)])
def test_rows_and_columns_differ(rows, columns):
    def bottom_right(b, h, q_idx, kv_idx):
        return (q_idx + columns - rows >= kv_idx) & (kv_idx % 5 != 2)

    mask = FlashMask.from_mask_mod(bottom_right, num_rows=rows, num_columns=columns, block=4)
    assert (mask.num_rows, mask.num_columns) == (rows, columns)
    assert torch.equal(mask.to_dense(), score_by_score(bottom_right, 1, 1, rows, columns))


def test_by_sample_and_head():
    width = torch.tensor([[2, 5, 30], [1, 9, 4]])
    length = torch.tensor([11, 29])

    def function(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx < width[b, h]) & (kv_idx < length[b]) & (q_idx >= kv_idx) & (width[0, h] != kv_idx)

    mask = FlashMask.from_mask_mod(function, batch=2, heads=3, num_rows=31, num_columns=31, block=8)
    assert (mask.batch, mask.heads) == (2, 3)
    assert torch.equal(mask.to_dense(), score_by_score(function, 2, 3, 31, 31))


def test_indexing_reads_no_value():
    operations = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func)
            return func(*args, **(kwargs or {}))

    x, i = torch.arange(12).view(3, 4), torch.tensor(1)
    with Record(), _TensorsAsIndices():
        gathered = [x[i], x[i, 2], x[i][i], x[[0, 1]], x[:, i], x[None], x[True]]
    values = [x[1], x[1, 2], x[1][1], x[[0, 1]], x[:, 1], x[None], x[True]]
    assert all(torch.equal(a, b) for a, b in zip(gathered, values, strict=True))
    operations.clear()
    with Record(), _TensorsAsIndices():
        assert int(x[i, 2]) == 6
    assert operations.count(torch.ops.aten.index.Tensor) == 1
    assert operations.count(torch.ops.aten._local_scalar_dense.default) == 1, "that of int()"


@settings(max_examples=examples(100))
@given(st.data())
def test_any_function(data):
    b, h = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    n_q, n_k = data.draw(st.integers(0, 13)), data.draw(st.integers(0, 9))
    count = b * h * n_q * n_k
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    visible = torch.tensor(flags, dtype=torch.bool).view(b, h, n_q, n_k)

    def function(i, j, q_idx, kv_idx):
        return visible[i, j, q_idx, kv_idx]

    def build(max_intervals):
        block = data.draw(st.integers(1, 14))
        sizes = {"batch": b, "heads": h, "num_rows": n_q, "num_columns": n_k}
        return FlashMask.from_mask_mod(function, **sizes, max_intervals=max_intervals, block=block)

    most = fewest_intervals(visible)
    mask = build(most)
    assert mask.num_intervals == most and torch.equal(mask.to_dense(), visible)
    if most:
        with pytest.raises(ValueError) as by_blocks:
            build(most - 1)
        with pytest.raises(ValueError) as at_once:
            FlashMask.from_dense(visible, max_intervals=most - 1)
        assert str(by_blocks.value) == str(at_once.value)


def test_too_many_intervals_name_the_column():
    def stripes(b, h, q_idx, kv_idx):
        return (q_idx % 2 == 0) | (kv_idx < 6)

    message = "column 6 (batch 0, head 0) has 10 masked intervals, more than max_intervals=4. Pass max_intervals=10"
    with pytest.raises(ValueError, match=re.escape(message)):
        FlashMask.from_mask_mod(stripes, num_rows=20, num_columns=9, block=3)
    mask = FlashMask.from_mask_mod(stripes, num_rows=20, num_columns=9, block=3, max_intervals=10)
    assert torch.equal(mask.to_dense(), score_by_score(stripes, 1, 1, 20, 9))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, those under vmap included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize(("rows", "columns"), [(300, 131_072), (131_072, 300), (2000, 2000)])
def test_no_square_is_made(rows, columns):
    part = torch.arange(max(rows, columns)) // 100

    def documents(b, h, q_idx, kv_idx):
        return (part[q_idx] == part[kv_idx]) & (q_idx >= kv_idx)

    with LargestTensor() as largest:
        mask = FlashMask.from_mask_mod(documents, num_rows=rows, num_columns=columns, block=128)
    expected = builders.causal_document([100] * -(-max(rows, columns) // 100))
    assert int(mask.area()) == int(expected.select(torch.arange(rows), torch.arange(columns)).area())
    # A block, or the intervals of all columns (two for these).
    assert 128 * 128 <= largest.elements <= max(128 * 128, 2 * columns)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda b, h, q, kv: q - kv, r"torch.int64 \[\]"),
        (lambda b, h, q, kv: (q - kv).float(), r"torch.float32 \[\]"),
        (lambda b, h, q, kv: True, "bool"),
        (lambda b, h, q, kv: None, "NoneType"),
        (lambda b, h, q, kv: (q >= kv)[None], r"torch.bool \[1\]"),
        (lambda b, h, q, kv: q >= torch.arange(9), r"torch.bool \[9\]"),
    ],
)
def test_other_results_are_refused(function, got):
    with pytest.raises(ValueError, match=f"must return a bool scalar tensor .* got {got}"):
        FlashMask.from_mask_mod(function, num_rows=9, num_columns=9)


@pytest.mark.parametrize(
    "function",
    [lambda b, h, q, kv: (q >= kv) and (q < 5), lambda b, h, q, kv: torch.rand(()) < 0.5],
    ids=["and", "random"],
)
def test_what_vmap_cannot_map_is_an_error(function):
    with pytest.raises(RuntimeError, match="vmap"):
        FlashMask.from_mask_mod(function, num_rows=9, num_columns=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": -1}, r"num_rows must be an integer in \[0, 2\*\*31\), got -1"),
        ({"num_columns": 2.0}, r"num_columns must be an integer .* got 2.0"),
        ({"batch": 0}, r"batch must be an integer in \[1, 2\*\*31\), got 0"),
        ({"heads": None}, r"heads must be an integer .* got None"),
        ({"block": 0}, r"block must be an integer in \[1, 2\*\*31\), got 0"),
        ({"max_intervals": -1}, "max_intervals must be >= 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlashMask.from_mask_mod(causal, **{"num_rows": 4, "num_columns": 4, **options})


def test_no_function_is_refused():
    with pytest.raises(ValueError, match=r"mask_mod must be a function .* got Tensor"):
        FlashMask.from_mask_mod(torch.ones(4, 4), num_rows=4, num_columns=4)
