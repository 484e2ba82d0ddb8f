"""Masks by name: the twelve cases of the FlashMask paper (arXiv 2410.01359, figure 1), prefix trees and lambda windows.

Every builder takes the length, or the lengths of what is packed, first, and returns a `FlashMask` of batch 1 and one
mask head on the CPU (`random_eviction`: as many as asked for). None makes a rows x columns tensor. In the pictures `x`
is visible and `.` is masked; rows are queries, columns are keys. Combine masks with `&` (visible in both):
`causal_document(lengths) & sliding_window(sum(lengths), 4096)`.

`num_rows`, where offered, gives fewer or more rows than columns, aligned bottom-right: the last row is that of the last
column, as with a key cache.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fm_longctx.mask.eviction import draw_evictions
from fm_longctx.mask.flash_mask import FlashMask

__all__ = [
    "causal",
    "causal_blockwise",
    "causal_document",
    "document",
    "full",
    "global_sliding_window",
    "lambda_window",
    "prefix_lm_causal",
    "prefix_lm_document",
    "prefix_tree",
    "qk_sparse",
    "random_eviction",
    "shared_question",
    "sliding_window",
]


def full(length: int, *, num_rows: int | None = None) -> FlashMask:
    """Every row sees every column."""
    _check_integer("length", length, at_least=0)
    return _mask(length, [], causal=False, num_rows=num_rows)


def causal(length: int, *, num_rows: int | None = None) -> FlashMask:
    """A row sees itself and what comes before it, as in `causal(4)`::

        x . . .
        x x . .
        x x x .
        x x x x

    With `num_rows=2` the last two of these rows are left.
    """
    _check_integer("length", length, at_least=0)
    return _mask(length, [], causal=True, num_rows=num_rows)


def sliding_window(length: int, window: int, *, num_rows: int | None = None) -> FlashMask:
    """Causal; a row sees `window` columns, itself included::

        x . . . .
        x x . . .
        . x x . .
        . . x x .
        . . . x x    sliding_window(5, 2)

    Source: Longformer, arXiv 2004.05150; Mistral's `sliding_window` counts the same way.
    """
    return lambda_window(length, 0, window, num_rows=num_rows)


def lambda_window(length: int, sinks: int, window: int, *, num_rows: int | None = None) -> FlashMask:
    """Causal; a row sees the first `sinks` columns and the last `window` columns, itself included::

        x . . . .
        x x . . .
        x x x . .
        x . x x .
        x . . x x    lambda_window(5, 1, 2)

    Source: StreamingLLM, arXiv 2309.17453 (there 4 sinks).
    """
    _check_integer("length", length, at_least=0)
    _check_integer("sinks", sinks, at_least=0)
    _check_integer("window", window, at_least=1)
    n_q = length if num_rows is None else num_rows
    _check_integer("num_rows", n_q, at_least=0)
    column = torch.arange(length)
    # Column j belongs to row j - (N_k - N_q); `window` rows from there on see it.
    start = torch.where(column < sinks, n_q, column - (length - n_q) + window)
    return _mask(length, [(start, n_q)], causal=True, num_rows=num_rows)


def global_sliding_window(length: int, num_global: int, each_side: int) -> FlashMask:
    """Not causal; a row sees `each_side` columns on either side of itself; the first `num_global` tokens see, and are
    seen by, every token::

        x x x x x x
        x x x . . .
        x x x x . .
        x . x x x .
        x . . x x x
        x . . . x x    global_sliding_window(6, 1, 1)

    Source: Longformer, arXiv 2004.05150.
    """
    _check_integer("length", length, at_least=0)
    _check_integer("num_global", num_global, at_least=0)
    _check_integer("each_side", each_side, at_least=0)
    column = torch.arange(length)
    local = column >= num_global
    below = torch.where(local, column + each_side + 1, length)
    above = torch.where(local, column - each_side, 0)
    return _mask(length, [(below, length), (num_global, above)], causal=False)


def causal_document(lengths: Sequence[int]) -> FlashMask:
    """Packed documents; a row sees what comes before it in its own document::

        x . . . .
        x x . . .
        x x x . .
        . . . x .
        . . . x x    causal_document([3, 2])

    Same as `FlashMask.from_lengths(lengths)`; `FlashMask.from_cu_seqlens` and `from_position_ids` take other forms.
    """
    return FlashMask.from_lengths(lengths, causal=True)


def document(lengths: Sequence[int]) -> FlashMask:
    """Packed documents; a row sees all of its own document, before and after::

        x x x . .
        x x x . .
        x x x . .
        . . . x x
        . . . x x    document([3, 2])

    Same as `FlashMask.from_lengths(lengths, causal=False)`.
    """
    return FlashMask.from_lengths(lengths, causal=False)


def shared_question(documents: Sequence[Sequence[int]]) -> FlashMask:
    """Packed questions, each with its answers: answers see their question and themselves, never one another. Causal::

        x . . . .
        x x . . .
        x x x . .
        x x . x .
        x x . x x    shared_question([[2, 1, 2]]): a question of 2 tokens, answers of 1 and 2

    For preference pairs (DPO, reward models): the question is computed once for all its answers. Each answer continues
    the question, so its positions go on from the question's last.

    Args:
        documents: per document its question's length, then its answers' lengths (none is allowed).
    """
    if not _is_sequence(documents) or not all(_is_sequence(d) and len(d) > 0 for d in documents):
        raise ValueError(
            "documents must be a sequence of [question length, answer length, ...] sequences, as in "
            f"[[100, 20, 30], [50, 10]], got {reprlib.repr(documents)}."
        )
    parents: list[int] = []
    for parts in documents:
        question = len(parents)
        parents += [-1] + [question] * (len(parts) - 1)
    return prefix_tree(parents, [length for parts in documents for length in parts])


def prefix_tree(parents: Sequence[int], lengths: Sequence[int]) -> FlashMask:
    """Packed token trees; a row sees the path from its root down to itself. Causal::

        prompt   x . . . .
        prompt   x x . . .
        a        x x x . .
        a1       x x x x .
        b        x x . . x    prefix_tree([-1, 0, 1, 0], [2, 1, 1, 1])

    For a prompt with branching completions (rollouts, tree search): what branches share is computed once. A token's
    position is its depth in tokens: positions go on from the end of the parent.

    Args:
        parents: per node the index of its parent, -1 for a root. Several roots pack several trees. Nodes come in
            depth-first order (a parent, then each child's whole subtree), which makes every subtree one run of rows.
        lengths: tokens of each node, >= 0.

    Raises:
        ValueError: lists of different lengths, a parent that does not come before its child, or nodes that are not in
            depth-first order.
    """
    lengths = _check_lengths("lengths", lengths)
    if not _is_sequence(parents) or len(parents) != len(lengths):
        raise ValueError(
            f"parents and lengths must have one entry a node, got {reprlib.repr(parents)} for {len(lengths)} nodes."
        )
    subtree_end = [0] * len(lengths)
    path: list[int] = []
    position = 0
    for node, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
        if isinstance(parent, bool) or not isinstance(parent, int) or not -1 <= parent < node:
            raise ValueError(f"parents[{node}] must be -1 (a root) or an earlier node, got {parent!r}.")
        if parent != -1 and parent not in path:
            raise ValueError(
                f"nodes must be in depth-first order: node {node} names parent {parent}, whose subtree has ended. "
                "List each child's whole subtree before its next sibling."
            )
        while path and path[-1] != parent:
            subtree_end[path.pop()] = position
        path.append(node)
        position += length
    for node in path:
        subtree_end[node] = position
    end = torch.tensor(subtree_end).repeat_interleave(torch.tensor(lengths))
    return _mask(position, [(end, position)], causal=True)


def causal_blockwise(lengths: Sequence[int]) -> FlashMask:
    """Causal; blocks see themselves only, but the last one sees every block::

        x . . . . .
        x x . . . .
        . . x . . .
        . . x x . .
        x x x x x .
        x x x x x x    causal_blockwise([2, 2, 2])

    For in-context learning: demonstrations that do not see one another, then the test. Source: arXiv 2405.00200.

    Args:
        lengths: tokens of each block; the last is the test block.
    """
    lengths = _check_lengths("lengths", lengths)
    _, end = _bounds(lengths)
    # The test block's own columns get [N, its start): nothing.
    return _mask(sum(lengths), [(end, sum(lengths[:-1]))], causal=True)


def prefix_lm_document(lengths: Sequence[int], prefixes: Sequence[int]) -> FlashMask:
    """Packed documents; within each, all rows see its prefix, and what follows the prefix is causal::

        x x . . .
        x x . . .
        x x x . .
        . . . x .
        . . . x x    prefix_lm_document([3, 2], [2, 1])

    Source: T5, arXiv 1910.10683, section 3.2.1.

    Args:
        lengths: tokens of each document, its prefix included.
        prefixes: tokens of each document's prefix, 0 to its length.
    """
    lengths = _check_lengths("lengths", lengths)
    prefixes = _check_lengths("prefixes", prefixes)
    if len(prefixes) != len(lengths) or any(p > n for p, n in zip(prefixes, lengths, strict=True)):
        raise ValueError(
            f"prefixes must give each of the {len(lengths)} documents a prefix of at most its length, got prefixes "
            f"{prefixes[:8]} for lengths {lengths[:8]}."
        )
    start, end = _bounds(lengths)
    column = torch.arange(sum(lengths))
    prefix_end = start + torch.tensor(prefixes).repeat_interleave(torch.tensor(lengths))
    above = torch.where(column < prefix_end, start, column)
    return _mask(sum(lengths), [(end, sum(lengths)), (0, above)], causal=False)


def prefix_lm_causal(length: int, prefix: int) -> FlashMask:
    """One sequence; all rows see the first `prefix` columns, the rest is causal::

        x x . .
        x x . .
        x x x .
        x x x x    prefix_lm_causal(4, 2)

    Same as `prefix_lm_document([length], [prefix])`.
    """
    _check_integer("length", length, at_least=0)
    _check_integer("prefix", prefix, at_least=0)
    if prefix > length:
        raise ValueError(f"prefix must be at most the length {length}, got {prefix}.")
    return prefix_lm_document([length], [prefix])


def qk_sparse(length: int, dropped: Sequence[tuple[int, int]]) -> FlashMask:
    """Causal; tokens of a dropped range do not see that range (themselves included), and later rows see it as ever::

        x . . . .
        x . . . .
        x . . . .
        x x x x .
        x x x x x    qk_sparse(5, [(1, 3)])

    A range that starts at 0 leaves its rows with nothing to see: their output is 0.

    Args:
        length: N.
        dropped: `(start, end)` of each range, half-open, ascending and disjoint, within `[0, length]`.
    """
    _check_integer("length", length, at_least=0)
    column = torch.arange(length)
    start, end = torch.full_like(column, length), torch.full_like(column, length)
    previous = 0
    for pair in dropped:
        if not _is_sequence(pair) or len(pair) != 2 or not previous <= pair[0] <= pair[1] <= length:
            raise ValueError(
                f"dropped must hold ascending, disjoint (start, end) pairs within [0, {length}], got "
                f"{reprlib.repr(pair)} after a range that ends at {previous}."
            )
        first, previous = pair
        start[first:previous] = column[first:previous]
        end[first:previous] = previous
    return _mask(length, [(start, end)], causal=True)


def random_eviction(length: int, *, batch: int = 1, heads: int = 1, seed: int = 0) -> FlashMask:
    """Causal; `length // 2` random columns are evicted, each from a random row on, no two from the same row::

        x . . . . .
        x x . . . .
        x x x . . .
        . x x x . .
        . x x . x .
        . x x . . x    random_eviction(6): columns 0, 3 and 4 are evicted from rows 3, 4 and 5 on

    Eviction rows lie in the second half and below the diagonal: every token sees itself. Source: the key-cache
    eviction case of arXiv 2410.01359.

    Args:
        length: N.
        batch, heads: B and H_mask of the result; each has its own draw.
        seed: the same seed gives the same mask, on every rank.

    Returns:
        a mask `[batch, heads]`.
    """
    _check_integer("length", length, at_least=0)
    _check_integer("batch", batch, at_least=1)
    _check_integer("heads", heads, at_least=1)
    _check_integer("seed", seed, at_least=0)
    starts = draw_evictions(length, batch * heads, seed).view(batch, heads, 1, length)
    return FlashMask(starts, torch.full_like(starts, length), causal=True)


def _mask(
    length: int, intervals: list[tuple[int | Tensor, int | Tensor]], *, causal: bool, num_rows: int | None = None
) -> FlashMask:
    """A mask from `(start, end)` of each interval, each a number for all columns or an int64 tensor `[N_k]`."""
    if length >= 2**31:
        raise ValueError(f"a mask has fewer than 2**31 columns, got {length}.")
    starts = torch.empty((1, 1, len(intervals), length), dtype=torch.int32)
    ends = torch.empty_like(starts)
    for i, (start, end) in enumerate(intervals):
        starts[0, 0, i], ends[0, 0, i] = start, end
    return FlashMask(starts, ends, causal=causal, num_rows=num_rows)


def _bounds(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Start and end of the part that each column lies in, int64 `[N]`."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    return (ends - sizes).repeat_interleave(sizes), ends.repeat_interleave(sizes)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}.")


def _check_lengths(name: str, lengths: Sequence[int]) -> list[int]:
    good = _is_sequence(lengths) and len(lengths) > 0
    if not good or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in lengths):
        raise ValueError(f"{name} must be a non-empty sequence of integers >= 0, got {reprlib.repr(lengths)}.")
    return list(lengths)
