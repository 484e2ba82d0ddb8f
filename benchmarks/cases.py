"""The mask cases that the benchmarks run: each a FlashMask and, independent of it, the rule in words as a function.

Parameters follow the kernel benchmark of the FlashMask paper (arXiv 2410.01359, section 5.3 and appendix): window N/16,
16 global tokens, prefix N/2; 3-7, 10-14 or 11-15 documents a sequence at 8K, 32K and 128K.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_longctx.mask import FlashMask, builders

Rule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    mask: FlashMask
    visible: Rule
    """(rows `[m, 1]`, columns `[1, n]`) -> bool `[m, n]`, True = visible; any device."""


def document_lengths(n: int, seed: int) -> list[int]:
    """Lengths of a packed sequence of n tokens: as many documents as the paper draws at that length."""
    generator = random.Random(seed)
    least, most = (3, 7) if n <= 8192 else (10, 14) if n <= 32768 else (11, 15)
    count = max(1, min(generator.randint(least, most), n // 8))
    cuts = sorted(generator.sample(range(1, n), count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What is drawn for the cases at one length: every case is a function of these numbers."""

    lengths: list[int]
    """Documents."""
    questions: list[list[int]]
    """Per document the length of its question, then of its answers."""
    prefixes: list[int]
    """Per document, how many of its first tokens every token of it sees."""
    dropped: list[tuple[int, int]]
    """Ranges of positions that do not see each other."""
    parents: list[int]
    node_lengths: list[int]
    """Nodes of the prefix tree, in depth-first order."""
    evicted: FlashMask
    window: int
    sinks: int


def draw(n: int, seed: int = 0) -> Draw:
    lengths = document_lengths(n, seed)
    generator = random.Random(seed + 1)
    questions = [_split(length, generator.randint(3, 7), generator) for length in lengths]
    prefixes = [generator.randint(1, length) for length in lengths]
    parents, node_lengths = _tree(n, generator)
    return Draw(
        lengths=lengths,
        questions=questions,
        prefixes=prefixes,
        dropped=[(start, end) for i, (start, end) in enumerate(_Parts(lengths).ranges) if i % 3 == 1],
        parents=parents,
        node_lengths=node_lengths,
        evicted=builders.random_eviction(n, seed=seed),
        window=max(1, n // 16),
        sinks=min(16, n),
    )


def cases(n: int, seed: int = 0) -> list[Case]:
    """The paper's twelve cases at n tokens, then prefix tree and lambda."""
    drawn = draw(n, seed)
    lengths, questions, prefixes, dropped = drawn.lengths, drawn.questions, drawn.prefixes, drawn.dropped
    parents, node_lengths, evicted = drawn.parents, drawn.node_lengths, drawn.evicted
    window, sinks = drawn.window, drawn.sinks

    document = _Parts(lengths)
    answer = _Parts([length for parts in questions for length in parts])
    is_question = [i == 0 for parts in questions for i in range(len(parts))]
    node = _Parts(node_lengths)
    sees_node = _ancestors(parents)

    def causal(r: Tensor, j: Tensor) -> Tensor:
        return j <= r

    def shared_question(r: Tensor, j: Tensor) -> Tensor:
        question = torch.tensor(is_question, device=j.device)[answer.of(j)]
        return causal(r, j) & (document.of(r) == document.of(j)) & (question | (answer.of(r) == answer.of(j)))

    def blockwise(r: Tensor, j: Tensor) -> Tensor:
        last = document.of(r) == len(lengths) - 1
        return causal(r, j) & (last | (document.of(r) == document.of(j)))

    def prefix_lm_document(r: Tensor, j: Tensor) -> Tensor:
        starts = torch.tensor([start for start, _ in document.ranges], device=j.device)[document.of(j)]
        in_prefix = j - starts < torch.tensor(prefixes, device=j.device)[document.of(j)]
        return (document.of(r) == document.of(j)) & (in_prefix | causal(r, j))

    def qk_sparse(r: Tensor, j: Tensor) -> Tensor:
        hidden = torch.zeros_like(r + j, dtype=torch.bool)
        for start, end in dropped:
            hidden |= (r >= start) & (r < end) & (j >= start) & (j < end)
        return causal(r, j) & ~hidden

    def random_eviction(r: Tensor, j: Tensor) -> Tensor:
        since = evicted.to_startend_row_indices()[0, 0, :, 0].to(j.device)
        return causal(r, j) & (r < since[j])

    def prefix_tree(r: Tensor, j: Tensor) -> Tensor:
        return causal(r, j) & sees_node.to(j.device)[node.of(r), node.of(j)]

    def global_window(r: Tensor, j: Tensor) -> Tensor:
        return ((r - j).abs() <= window) | (j < sinks) | (r < sinks)

    everything: Rule = lambda r, j: torch.ones_like(r + j, dtype=torch.bool)  # noqa: E731
    table: list[tuple[str, FlashMask, Rule]] = [
        ("full", builders.full(n), everything),
        ("causal", builders.causal(n), causal),
        ("sliding_window", builders.sliding_window(n, window), lambda r, j: causal(r, j) & (r - j < window)),
        ("causal_document", builders.causal_document(lengths), causal_document_case(lengths).visible),
        ("document", builders.document(lengths), lambda r, j: document.of(r) == document.of(j)),
        ("shared_question", builders.shared_question(questions), shared_question),
        ("global_sliding_window", builders.global_sliding_window(n, sinks, window), global_window),
        ("causal_blockwise", builders.causal_blockwise(lengths), blockwise),
        ("prefix_lm_document", builders.prefix_lm_document(lengths, prefixes), prefix_lm_document),
        ("prefix_lm_causal", builders.prefix_lm_causal(n, n // 2), lambda r, j: causal(r, j) | (j < n // 2)),
        ("qk_sparse", builders.qk_sparse(n, dropped), qk_sparse),
        ("random_eviction", evicted, random_eviction),
        ("prefix_tree", builders.prefix_tree(parents, node_lengths), prefix_tree),
        (
            "lambda",
            builders.lambda_window(n, 64, 4096),
            lambda r, j: causal(r, j) & ((j < 64) | (r - j < 4096)),
        ),
    ]
    return [Case(name=name, mask=mask, visible=rule) for name, mask, rule in table]


def causal_document_case(lengths: list[int], name: str = "causal_document") -> Case:
    """Packed causal documents of any lengths."""
    document = _Parts(lengths)

    def visible(r: Tensor, j: Tensor) -> Tensor:
        return (j <= r) & (document.of(r) == document.of(j))

    return Case(name=name, mask=builders.causal_document(lengths), visible=visible)


class _Parts:
    """Consecutive parts of a sequence: `of(index)` is the part that holds a position."""

    def __init__(self, lengths: list[int]) -> None:
        ends = torch.tensor(lengths).cumsum(0)
        self.ranges: list[tuple[int, int]] = [(int(e) - n, int(e)) for e, n in zip(ends, lengths, strict=True)]
        self._ends = ends

    def of(self, index: Tensor) -> Tensor:
        return torch.searchsorted(self._ends.to(index.device), index.contiguous(), right=True)


def _split(length: int, parts: int, generator: random.Random) -> list[int]:
    parts = min(parts, length)
    cuts = sorted(generator.sample(range(1, length), parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


def _tree(n: int, generator: random.Random) -> tuple[list[int], list[int]]:
    """A prompt of a quarter of the tokens, then branches that branch once more, in depth-first order."""
    parents, lengths = [-1], [max(1, n // 4)]
    left = n - lengths[0]
    while left > 0:
        stem = min(left, max(1, generator.randint(n // 32, n // 8)))
        parents.append(0)
        lengths.append(stem)
        left -= stem
        parent = len(parents) - 1
        for _ in range(generator.randint(0, 3)):
            leaf = min(left, max(1, generator.randint(n // 64, n // 16)))
            if leaf > 0:
                parents.append(parent)
                lengths.append(leaf)
                left -= leaf
    return parents, lengths


def _ancestors(parents: list[int]) -> Tensor:
    """Bool `[nodes, nodes]`: the column's node is the row's node or one of its ancestors."""
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees
