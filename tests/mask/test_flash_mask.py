"""The mask itself against the loop that defines it, over adversarial intervals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.mask import causal_document, full, sliding_window
from tests.mask.oracle import Raw, dense_of_intervals, raw_masks, runs
from tests.properties import examples

_SHAPE = (1, 2, 6, 5)


def build(raw: Raw) -> FlashMask:
    return FlashMask(raw.starts, raw.ends, causal=raw.causal, num_rows=raw.num_rows)


@settings(max_examples=examples(300))
@given(raw_masks())
def test_dense_and_area(raw):
    expected = dense_of_intervals(raw)
    mask = build(raw)
    assert torch.equal(mask.to_dense(), expected)
    assert mask.area().dtype == torch.int64
    assert torch.equal(mask.area(), expected.sum((2, 3)))


@settings(max_examples=examples(300))
@given(raw_masks())
def test_canonical_form(raw):
    mask = build(raw)
    b, h, k, n_k = mask.starts.shape
    dense = dense_of_intervals(raw)
    most = 0
    for i in range(b):
        for j in range(h):
            for c in range(n_k):
                floor = min(max(0, c - (n_k - raw.num_rows)), raw.num_rows) if raw.causal else 0
                bounds = list(zip(mask.starts[i, j, :, c].tolist(), mask.ends[i, j, :, c].tolist(), strict=True))
                used = [(s, e) for s, e in bounds if s < e]
                # Used slots first, in order, apart from one another, within the rows and below the diagonal.
                assert bounds == used + [(raw.num_rows, raw.num_rows)] * (k - len(used))
                assert all(floor <= s and e <= raw.num_rows for s, e in used)
                assert all(before[1] < after[0] for before, after in itertools.pairwise(used))
                assert len(used) == runs([not v for v in dense[i, j, floor:, c].tolist()])
                most = max(most, len(used))
    assert k == most
    again = FlashMask(mask.starts, mask.ends, causal=mask.causal, num_rows=mask.num_rows)
    assert torch.equal(again.starts, mask.starts) and torch.equal(again.ends, mask.ends)


@settings(max_examples=examples(300))
@given(raw_masks(shape=_SHAPE), raw_masks(shape=_SHAPE), st.randoms(use_true_random=False))
def test_fingerprint_is_equal_exactly_for_equal_masks(a, b, random):
    mask, other = build(a), build(b)
    same = a.causal == b.causal and torch.equal(dense_of_intervals(a), dense_of_intervals(b))
    assert (mask.fingerprint() == other.fingerprint()) == same
    # The same content said otherwise: intervals in another order, and an interval twice.
    order = list(range(a.starts.shape[2])) * 2
    random.shuffle(order)
    restated = FlashMask(a.starts[:, :, order], a.ends[:, :, order], causal=a.causal, num_rows=a.num_rows)
    assert restated.fingerprint() == mask.fingerprint()


def test_fingerprint_tells_shape_rows_and_causality_apart():
    masks = [
        full(4),
        full(5),
        full(4, num_rows=5),
        full(5, num_rows=4),
        FlashMask(*[torch.zeros(1, 1, 0, 4, dtype=torch.int32)] * 2, causal=True),
        FlashMask(*[torch.zeros(1, 2, 0, 4, dtype=torch.int32)] * 2, causal=False),
        FlashMask(*[torch.zeros(2, 1, 0, 4, dtype=torch.int32)] * 2, causal=False),
    ]
    assert len({mask.fingerprint() for mask in masks}) == len(masks)
    assert len(full(4).fingerprint()) == 32


def test_a_change_of_one_bound_changes_the_fingerprint():
    mask = causal_document([5, 3])
    for c in range(4):
        starts = mask.starts.clone()
        starts[..., c] += 1
        assert FlashMask(starts, mask.ends, causal=True).fingerprint() != mask.fingerprint()


@settings(max_examples=examples(400))
@given(st.data())
def test_and(data):
    n_q, n_k = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 7))
    sizes = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)])
    a = data.draw(raw_masks(max_intervals=2, shape=(*data.draw(sizes), n_q, n_k)))
    b = data.draw(raw_masks(max_intervals=2, shape=(*data.draw(sizes), n_q, n_k)))
    both = build(a) & build(b)
    assert torch.equal(both.to_dense(), dense_of_intervals(a) & dense_of_intervals(b))
    assert both.causal == (a.causal or b.causal)


@settings(max_examples=examples(300))
@given(raw_masks(), st.data())
def test_select_is_dense_indexing(raw, data):
    n_q, n_k = raw.num_rows, raw.starts.shape[3]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n_q - 1)) if n_q else st.just(set()))), dtype=dtype)
    any_columns = st.lists(st.integers(0, n_k - 1), max_size=12) if n_k else st.just([])
    columns = torch.tensor(data.draw(any_columns), dtype=dtype)
    dense = dense_of_intervals(raw)
    mask = build(raw)

    part = mask.select(rows, columns)
    assert torch.equal(part.to_dense(), dense[:, :, rows.long()][..., columns.long()])
    assert part.causal is False
    assert part.num_intervals <= mask.num_intervals + raw.causal
    assert torch.equal(mask.select(rows).to_dense(), dense[:, :, rows.long()])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_select_shards_partition_the_area(world_size):
    mask = causal_document([40, 1, 23, 47]) & sliding_window(111, 30)
    owner = torch.arange(111) // 8 % world_size
    parts = [mask.select((owner == rank).nonzero()[:, 0]) for rank in range(world_size)]
    assert sum(int(part.area()) for part in parts) == int(mask.area()) == int(mask.to_dense().sum())


def test_to_is_itself_on_its_device():
    mask = causal_document([3, 2])
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.starts.shape == mask.starts.shape and moved.causal


def test_repr():
    assert repr(causal_document([3, 2])) == (
        "FlashMask(5 rows x 5 columns, batch=1, heads=1, intervals=1, causal=True, 36.0% visible, device=cpu)"
    )
    assert "0 rows x 0 columns" in repr(full(0)) and "empty" in repr(full(0))


def test_million_tokens_without_a_square():
    n = 1_000_000
    assert int(full(n).area()) == n * n
    assert int(sliding_window(n, 4096).area()) == n * 4096 - 4095 * 4096 // 2
    assert int(causal_document([n // 4] * 4).area()) == 4 * (n // 4) * (n // 4 + 1) // 2


_ZEROS = torch.zeros(1, 1, 1, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("starts", "ends", "options", "message"),
    [
        ([0], _ZEROS, {"causal": True}, r"starts must be an int32 tensor \[B, H_mask, K, N_k\], got list"),
        (_ZEROS.long(), _ZEROS, {"causal": True}, r"starts must be int32, got torch.int64. Convert it with starts.to"),
        (_ZEROS, _ZEROS.float(), {"causal": True}, r"ends must be int32, got torch.float32"),
        (_ZEROS[0], _ZEROS[0], {"causal": True}, r"starts must have shape \[B, H_mask, K, N_k\], got \[1, 1, 4\]"),
        (_ZEROS, _ZEROS[..., :3], {"causal": True}, r"one shape, got \[1, 1, 1, 4\] and \[1, 1, 1, 3\]"),
        (_ZEROS, _ZEROS.to("meta"), {"causal": True}, r"one device, got cpu and meta"),
        (_ZEROS, _ZEROS, {"causal": 1}, r"causal must be True or False, got 1"),
        (_ZEROS, _ZEROS, {"causal": True, "num_rows": -1}, r"num_rows must be an integer in \[0, 2\*\*31\), got -1"),
        (_ZEROS, _ZEROS, {"causal": True, "num_rows": 2**31}, r"num_rows must be an integer"),
        (_ZEROS, _ZEROS, {"causal": True, "num_rows": 4.0}, r"num_rows must be an integer .* got 4.0"),
        (_ZEROS, _ZEROS, {"causal": True, "num_rows": True}, r"num_rows must be an integer .* got True"),
    ],
)
def test_constructor_refuses(starts, ends, options, message):
    with pytest.raises(ValueError, match=message):
        FlashMask(starts, ends, **options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (full(5), r"same rows and columns, got 4 x 4 and 5 x 5"),
        (full(4, num_rows=3), r"same rows and columns, got 4 x 4 and 3 x 4"),
        (FlashMask(*[torch.zeros(3, 1, 0, 4, dtype=torch.int32)] * 2, causal=False), r"agree in batch .* got 2 and 3"),
        (FlashMask(*[torch.zeros(1, 4, 0, 4, dtype=torch.int32)] * 2, causal=False), r"agree in heads .* got 2 and 4"),
        (full(4).to("meta"), r"one device, got cpu and meta"),
    ],
)
def test_and_refuses(other, message):
    mask = FlashMask(*[torch.zeros(2, 2, 0, 4, dtype=torch.int32)] * 2, causal=False)
    with pytest.raises(ValueError, match=message):
        mask & other


def test_and_with_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        full(4) & True


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([2, 1], None, r"rows must be strictly ascending. Sort them"),
        ([1, 1], None, r"rows must be strictly ascending"),
        ([0, 4], None, r"rows must lie in \[0, 4\), got 0..4"),
        ([-1], None, r"rows must lie in \[0, 4\), got -1..-1"),
        ([0.0], None, r"rows must be a 1-D integer tensor, got torch.float32 \[1\]"),
        ([[0]], None, r"rows must be a 1-D integer tensor, got torch.int64 \[1, 1\]"),
        ([0], [5, 1], r"columns must lie in \[0, 5\), got 1..5"),
        ([0], [True], r"columns must be a 1-D integer tensor, got torch.bool"),
    ],
)
def test_select_refuses(rows, columns, message):
    mask = full(5, num_rows=4)
    with pytest.raises(ValueError, match=message):
        mask.select(torch.tensor(rows), None if columns is None else torch.tensor(columns))
