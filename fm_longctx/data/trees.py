"""Token trees side by side in one sequence: rows, positions, labels, mask, and sliding windows counted in positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_longctx.data.sequence import IGNORED
from fm_longctx.mask import FlashMask, builders


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """A run of tokens that continues its parent's."""

    parent: int
    """Index within the tree, -1 for a root."""
    tokens: list[int]
    labels: list[int]
    """The token where it is to be predicted, `IGNORED` elsewhere."""
    is_sequence: bool = True
    """Whether it counts as a sequence of its own; a shared question does not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """N rows of one or several trees. Each branch begins with a copy of the last token before it, which predicts the
    branch's first token; the token itself has no row of its own then."""

    tokens: Tensor
    """int64 `[N]`."""
    positions: Tensor
    """int64 `[N]`: depth in tokens."""
    labels: Tensor
    """int64 `[N]`: what the row predicts, the next token of its branch, or `IGNORED`."""
    sequence_ids: Tensor
    """int64 `[N]`: the sequence that the row's label belongs to, -1 where that is none."""
    ends: Tensor
    """int64 `[sequences]`: the row of each one's last token; -1 if it has no token, or branches hold copies of it."""
    mask: FlashMask
    runs: tuple[tuple[int, int, int, int], ...]
    """Rows `[start, end)` of each node, the position of the first, and the end of the tree's rows."""


def answers_of(question: list[int], answers: list[list[int]]) -> list[Node]:
    """A question, of which nothing is predicted, and its answers: the tree of preference pairs and completions."""
    root = Node(parent=-1, tokens=question, labels=[IGNORED] * len(question), is_sequence=False)
    return [root, *(Node(parent=0, tokens=answer, labels=answer) for answer in answers)]


def num_rows(nodes: list[Node]) -> int:
    """Rows that `pack` gives a tree: its tokens, and where it branches one copy more for each branch but one."""
    kept, _, _ = _number(nodes, 0)
    branches = [0] * len(kept)
    for node in kept:
        if node.parent >= 0:
            branches[node.parent] += 1
    return sum(len(node.tokens) for node in kept) + sum(n - 1 for n in branches if n > 1)


def pack(trees: list[list[Node]]) -> Packed:
    """The trees' rows, one tree after the other.

    Raises:
        ValueError: nodes that are not in depth-first order, or no token at all.
    """
    tokens: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    sequence_ids: list[int] = []
    parents: list[int] = []
    lengths: list[int] = []
    runs: list[tuple[int, int, int, int]] = []
    ends: dict[int, int] = {}
    sequences = 0
    for nodes in trees:
        base, first_run = len(parents), len(runs)
        nodes, ids, sequences = _number(nodes, sequences)
        children: list[list[int]] = [[] for _ in nodes]
        depth: list[int] = []
        for i, node in enumerate(nodes):
            if node.parent >= 0:
                children[node.parent].append(i)
            depth.append(0 if node.parent < 0 else depth[node.parent] + len(nodes[node.parent].tokens))
        for i, node in enumerate(nodes):
            row_tokens, row_labels, row_ids, start = node.tokens, node.labels, ids[i], depth[i]
            predicts = [*row_labels[1:], IGNORED]
            owners = [row_ids] * len(row_tokens)
            if len(children[i]) == 1:
                # The only child's rows come next, and its first token is what this node's last one predicts.
                child = children[i][0]
                predicts[-1], owners[-1] = nodes[child].labels[0], ids[child]
            elif children[i]:
                row_tokens, predicts, owners = row_tokens[:-1], predicts[:-1], owners[:-1]
            if node.parent >= 0 and len(children[node.parent]) > 1:
                row_tokens = [nodes[node.parent].tokens[-1], *row_tokens]
                predicts = [row_labels[0], *predicts]
                owners = [row_ids, *owners]
                start -= 1
            runs.append((len(tokens), len(tokens) + len(row_tokens), start, 0))
            if ids[i] >= 0 and len(children[i]) < 2:
                ends[ids[i]] = runs[-1][1] - 1
            tokens += row_tokens
            positions += range(start, start + len(row_tokens))
            labels += predicts
            sequence_ids += owners
            parents.append(node.parent + base if node.parent >= 0 else -1)
            lengths.append(len(row_tokens))
        runs[first_run:] = [(a, b, s, len(tokens)) for a, b, s, _ in runs[first_run:]]
    if not tokens:
        raise ValueError("the features of this batch have no tokens.")
    return Packed(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        labels=torch.tensor(labels),
        sequence_ids=torch.tensor(sequence_ids),
        ends=torch.tensor([ends.get(i, -1) for i in range(sequences)], dtype=torch.int64),
        mask=builders.prefix_tree(parents, lengths),
        runs=tuple(runs),
    )


def windowed(packed: Packed, window: int) -> FlashMask:
    """The mask narrowed to a sliding window of `window` positions, a row's own included, along each branch.

    A column at position p is hidden from the rows at p + window and beyond: a suffix of each node's rows, so one
    interval for each of the tree's nodes before they are merged.
    """
    n = packed.tokens.numel()
    trees: dict[int, list[tuple[int, int, int]]] = {}
    for start, end, position, tree_end in packed.runs:
        trees.setdefault(tree_end, []).append((start, end, position))
    parts = []
    first = 0
    for end, nodes in trees.items():
        bounds = torch.tensor([node for node in nodes if node[0] < node[1]]) - torch.tensor([first, first, 0])
        begins, ends, depth = (column[:, None] for column in bounds.unbind(1))
        hidden_from = packed.positions[first:end] + window - depth + begins
        starts = torch.minimum(torch.maximum(hidden_from, begins), ends)
        intervals = FlashMask(
            starts[None, None].int(), ends.expand_as(starts)[None, None].int(), causal=True, num_rows=end - first
        )
        parts.append((intervals, first))
        first = end
    most = max(part.num_intervals for part, _ in parts)
    all_starts = torch.zeros((1, 1, most, n), dtype=torch.int32)
    all_ends = torch.zeros_like(all_starts)
    for part, first in parts:
        columns = slice(first, first + part.num_columns)
        all_starts[:, :, : part.num_intervals, columns] = part.starts + first
        all_ends[:, :, : part.num_intervals, columns] = part.ends + first
    return packed.mask & FlashMask(all_starts, all_ends, causal=True)


def _number(nodes: list[Node], sequences: int) -> tuple[list[Node], list[int], int]:
    """The nodes without the empty ones, whose children pass to their parent, and each one's sequence, counting on."""
    kept: list[Node] = []
    ids: list[int] = []
    place: list[int] = []
    for i, node in enumerate(nodes):
        if not -1 <= node.parent < i:
            raise ValueError(f"parents[{i}] must be -1 (a root) or an earlier node, got {node.parent}.")
        parent = place[node.parent] if node.parent >= 0 else -1
        number = sequences if node.is_sequence else -1
        sequences += node.is_sequence
        if node.tokens:
            place.append(len(kept))
            kept.append(Node(parent=parent, tokens=node.tokens, labels=node.labels, is_sequence=node.is_sequence))
            ids.append(number)
        else:
            place.append(parent)
    return kept, ids, sequences
