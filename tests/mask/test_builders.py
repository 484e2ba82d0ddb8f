"""Every builder against its words, score by score."""

import itertools
import random

import pytest
import torch

from fm_longctx import FlashMask
from fm_longctx.mask import builders
from tests.mask.oracle import dense_of_words, index_of_part

LENGTHS = [[1], [5], [3, 2], [4, 0, 1, 6], [1, 1, 1, 1], [7, 3, 9, 2]]


def check(mask, n_q, n_k, sees):
    assert (mask.batch, mask.heads, mask.num_rows, mask.num_columns) == (1, 1, n_q, n_k)
    assert torch.equal(mask.to_dense()[0, 0], dense_of_words(n_q, n_k, sees))


@pytest.mark.parametrize(("n", "n_q"), [(0, 0), (1, 1), (7, 7), (7, 3), (3, 7), (5, 0)])
def test_full_and_causal(n, n_q):
    rows = None if n == n_q else n_q
    check(builders.full(n, num_rows=rows), n_q, n, lambda r, c: True)
    # Aligned bottom-right: row r is the token at r + n - n_q.
    check(builders.causal(n, num_rows=rows), n_q, n, lambda r, c: c <= r + n - n_q)


@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize(("n", "n_q"), [(0, 0), (1, 1), (9, 9), (9, 4), (4, 9)])
def test_sliding_window_and_lambda(n, n_q, window):
    rows = None if n == n_q else n_q

    def near(r, c):
        token = r + n - n_q
        return c in range(token - window + 1, token + 1)

    check(builders.sliding_window(n, window, num_rows=rows), n_q, n, near)
    for sinks in (0, 1, 3, 12):
        check(
            builders.lambda_window(n, sinks, window, num_rows=rows),
            n_q,
            n,
            lambda r, c, sinks=sinks: near(r, c) or (c < sinks and c <= r + n - n_q),
        )


def test_a_row_of_a_sliding_window_sees_as_many_columns_as_it_says():
    assert builders.sliding_window(10, 3).to_dense()[0, 0].sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("num_global", [0, 1, 3, 20])
@pytest.mark.parametrize("each_side", [0, 1, 4, 20])
@pytest.mark.parametrize("n", [0, 1, 11])
def test_global_sliding_window(n, num_global, each_side):
    def sees(r, c):
        return abs(r - c) <= each_side or r < num_global or c < num_global

    check(builders.global_sliding_window(n, num_global, each_side), n, n, sees)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents(lengths):
    part = index_of_part(lengths)
    n = len(part)
    check(builders.causal_document(lengths), n, n, lambda r, c: part[r] == part[c] and c <= r)
    check(builders.document(lengths), n, n, lambda r, c: part[r] == part[c])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_causal_blockwise(lengths):
    part = index_of_part(lengths)
    n, last = len(part), len(lengths) - 1
    sees = lambda r, c: c <= r and (part[r] == part[c] or part[r] == last)  # noqa: E731
    check(builders.causal_blockwise(lengths), n, n, sees)


@pytest.mark.parametrize(
    "documents", [[[4]], [[2, 3]], [[2, 1, 2]], [[3, 2, 4, 1], [1, 1], [2, 2, 2, 2, 2, 2, 2]], [[0, 2, 3], [2, 0, 3]]]
)
def test_shared_question(documents):
    label = [(d, a) for d, parts in enumerate(documents) for a, length in enumerate(parts) for _ in range(length)]
    n = len(label)

    def sees(r, c):
        same_document = label[r][0] == label[c][0]
        return c <= r and same_document and label[c][1] in (0, label[r][1])

    check(builders.shared_question(documents), n, n, sees)


TREES = [
    ([-1], [4]),
    ([-1, -1], [2, 3]),
    ([-1, 0, 1, 0], [2, 1, 1, 1]),
    ([-1, 0, 1, 1, 0, 4, 4, -1, 7, 7], [3, 2, 1, 4, 2, 1, 3, 2, 2, 1]),
    ([-1, 0, 1, 2, 3], [1, 2, 3, 2, 1]),
    ([-1, 0, 0, 2, 2, 0], [0, 2, 0, 3, 1, 2]),
]


def depth_first_trees():
    """Random trees, numbered as a depth-first walk meets them."""
    generator = random.Random(0)
    for _ in range(20):
        path, parents = [], []
        for node in range(generator.randint(1, 9)):
            del path[generator.randint(0, len(path)) :]
            parents.append(path[-1] if path else -1)
            path.append(node)
        yield parents, [generator.randint(0, 4) for _ in parents]


@pytest.mark.parametrize(("parents", "lengths"), [*TREES, *depth_first_trees()])
def test_prefix_tree(parents, lengths):
    node = index_of_part(lengths)

    def path(i):
        return {i} | (path(parents[i]) if parents[i] >= 0 else set())

    check(
        builders.prefix_tree(parents, lengths), len(node), len(node), lambda r, c: c <= r and node[c] in path(node[r])
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_prefix_lm(lengths, share):
    part = index_of_part(lengths)
    prefixes = [int(length * share) for length in lengths]
    first = [0, *itertools.accumulate(lengths)]
    n = len(part)

    def sees(r, c):
        return part[r] == part[c] and (c <= r or c - first[part[c]] < prefixes[part[c]])

    check(builders.prefix_lm_document(lengths, prefixes), n, n, sees)
    prefix = int(n * share)
    check(builders.prefix_lm_causal(n, prefix), n, n, lambda r, c: c <= r or c < prefix)


@pytest.mark.parametrize("dropped", [[], [(0, 3)], [(2, 5)], [(1, 2), (2, 4), (6, 9)], [(4, 4)], [(0, 9)]])
def test_qk_sparse(dropped):
    def sees(r, c):
        return c <= r and not any(start <= r < end and start <= c < end for start, end in dropped)

    check(builders.qk_sparse(9, dropped), 9, 9, sees)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8, 33])
def test_random_eviction(n):
    mask = builders.random_eviction(n, batch=2, heads=3, seed=5)
    assert (mask.batch, mask.heads, mask.num_rows, mask.num_columns) == (2, 3, n, n)
    dense = mask.to_dense()
    assert bool(dense.diagonal(dim1=2, dim2=3).all()), "no diagonal is masked"
    for visible in dense.flatten(0, 1):
        evicted = {}
        for c in range(n):
            assert not bool(visible[:c, c].any()), "causal"
            seen = [r for r in range(n) if visible[r, c]]
            assert seen == list(range(c, c + len(seen))), "seen from its own row on, without a gap"
            if c + len(seen) < n:
                evicted[c] = c + len(seen)
        assert len(evicted) == n // 2
        assert len(set(evicted.values())) == n // 2, "no two from the same row"
        assert all(n // 2 <= row < n for row in evicted.values())


def test_random_eviction_is_random_and_repeatable():
    prints = [builders.random_eviction(40, heads=2, seed=seed).fingerprint() for seed in (0, 1, 2, 0)]
    assert prints[0] == prints[3] and len(set(prints)) == 3
    two = builders.random_eviction(40, heads=2, seed=3)
    assert not torch.equal(two.starts[0, 0], two.starts[0, 1])
    # Over many draws every column but the last is evicted sometimes, and kept sometimes.
    starts = builders.random_eviction(12, heads=200).starts[0, :, 0]
    gone = (starts < 12).double().mean(0)
    assert gone[-1] == 0 and bool(((gone[:-1] > 0.3) & (gone[:-1] < 0.8)).all())
    # And a column is evicted from any row of the second half.
    assert set(starts[:, 0].tolist()) == {6, 7, 8, 9, 10, 11, 12}


def test_builders_compose():
    lengths = [20, 11, 30]
    part = index_of_part(lengths)
    mask = builders.causal_document(lengths) & builders.sliding_window(61, 8)
    check(mask, 61, 61, lambda r, c: part[r] == part[c] and r - 8 < c <= r)


def test_every_builder_is_exported():
    import fm_longctx.mask as room

    public = {name for name in vars(builders) if not name.startswith("_") and callable(getattr(builders, name))}
    made_here = {name for name in public if getattr(builders, name).__module__ == builders.__name__}
    assert made_here == set(builders.__all__)
    assert set(room.__all__) == made_here | {"FlashMask"}
    assert all(getattr(room, name) is getattr(builders, name) for name in builders.__all__)


def test_long_builders_make_no_square():
    n = 1 << 20
    masks = [
        builders.shared_question([[100, 50, 50]] * (n // 200)),
        builders.prefix_tree([-1] + [0] * 1023, [1024] * 1024),
        builders.global_sliding_window(n, 16, 512),
        builders.prefix_lm_document([1 << 16] * 16, [1 << 10] * 16),
    ]
    assert all(isinstance(mask, FlashMask) for mask in masks)
    assert int(masks[1].area()) == 1024 * 1025 // 2 * 1024 + 1023 * 1024 * 1024


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: builders.full(-1), "length must be an integer >= 0, got -1"),
        (lambda: builders.causal(3.0), "length must be an integer >= 0, got 3.0"),
        (lambda: builders.causal(True), "length must be an integer >= 0, got True"),
        (lambda: builders.causal(4, num_rows=-2), "num_rows must be an integer .* got -2"),
        (lambda: builders.full(2**31), r"fewer than 2\*\*31 columns, got 2147483648"),
        (lambda: builders.sliding_window(4, 0), "window must be an integer >= 1, got 0"),
        (lambda: builders.sliding_window(4, 2, num_rows="x"), "num_rows must be an integer .* got 'x'"),
        (lambda: builders.lambda_window(4, -1, 2), "sinks must be an integer >= 0, got -1"),
        (lambda: builders.global_sliding_window(4, -1, 2), "num_global must be an integer >= 0, got -1"),
        (lambda: builders.global_sliding_window(4, 1, -2), "each_side must be an integer >= 0, got -2"),
        (lambda: builders.causal_document([]), "lengths must be a non-empty sequence of integers >= 0"),
        (lambda: builders.document([2, -1]), r"lengths must be .* got \[2, -1\]"),
        (lambda: builders.causal_blockwise([]), r"lengths must be a non-empty sequence of integers >= 0, got \[\]"),
        (lambda: builders.causal_blockwise(5), "lengths must be a non-empty sequence of integers >= 0, got 5"),
        (lambda: builders.shared_question([5, 3]), "documents must be a sequence of .question length, answer length"),
        (lambda: builders.shared_question([[5], []]), "documents must be a sequence"),
        (lambda: builders.shared_question([[5, -1]]), r"lengths must be .* got \[5, -1\]"),
        (lambda: builders.prefix_tree([-1], [1, 2]), r"one entry a node, got \[-1\] for 2 nodes"),
        (
            lambda: builders.prefix_tree([-1, 1], [1, 2]),
            r"parents\[1\] must be -1 \(a root\) or an earlier node, got 1",
        ),
        (lambda: builders.prefix_tree([-2], [1]), r"parents\[0\] must be -1 \(a root\) or an earlier node, got -2"),
        (lambda: builders.prefix_tree([None], [1]), r"parents\[0\] must be .* got None"),
        (
            lambda: builders.prefix_tree([-1, 0, 0, 1], [1] * 4),
            "depth-first order: node 3 names parent 1, whose subtree",
        ),
        (lambda: builders.prefix_lm_document([3, 2], [1]), r"each of the 2 documents a prefix .* got prefixes \[1\]"),
        (lambda: builders.prefix_lm_document([3, 2], [1, 3]), "a prefix of at most its length"),
        (lambda: builders.prefix_lm_causal(3, 4), "prefix must be at most the length 3, got 4"),
        (lambda: builders.prefix_lm_causal(3, -1), "prefix must be an integer >= 0, got -1"),
        (lambda: builders.qk_sparse(9, [(3, 1)]), r"within \[0, 9\], got \(3, 1\) after a range that ends at 0"),
        (lambda: builders.qk_sparse(9, [(3, 5), (4, 6)]), r"got \(4, 6\) after a range that ends at 5"),
        (lambda: builders.qk_sparse(9, [(3, 10)]), r"within \[0, 9\], got \(3, 10\)"),
        (lambda: builders.qk_sparse(9, [5]), r"\(start, end\) pairs within \[0, 9\], got 5"),
        (lambda: builders.random_eviction(9, heads=0), "heads must be an integer >= 1, got 0"),
        (lambda: builders.random_eviction(9, batch=0), "batch must be an integer >= 1, got 0"),
        (lambda: builders.random_eviction(9, seed=-1), "seed must be an integer >= 0, got -1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def docstring_pictures():
    """(call, matrix) of every picture in a builder's docstring that is captioned with its call."""
    for name in builders.__all__:
        rows = []
        for line in (getattr(builders, name).__doc__ or "").splitlines():
            words = line.split()
            # Row labels (prompt, a1) may stand before the cells.
            cells = list(
                itertools.takewhile(
                    lambda w: w in ("x", "."), itertools.dropwhile(lambda w: w not in ("x", "."), words)
                )
            )
            if not cells:
                rows = []
                continue
            rows.append([cell == "x" for cell in cells])
            if f"{name}(" in line:
                call = line[line.index(f"{name}(") :]
                yield call[: call.rindex(")") + 1], rows


def test_docstring_pictures_are_true():
    pictures = list(docstring_pictures())
    assert len(pictures) >= 11
    for call, rows in pictures:
        mask = eval(call, {"__builtins__": {}}, vars(builders))
        assert mask.to_dense()[0, 0].tolist() == rows, call
