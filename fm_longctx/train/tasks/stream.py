"""Records in a shuffled order, whole ones side by side in sequences of one length, each with its answers' mask."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fm_longctx.data import IGNORED, PackedSequence
from fm_longctx.data.jsonl import JsonLines
from fm_longctx.data.trees import Node, pack
from fm_longctx.mask import FlashMask
from fm_longctx.train.tasks.records import Record

READ_AT = "read_at"
"""Of `PackedSequence.extra`: the answer, counted within the sequence, that a row says something of; -1 for none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a sequence's answers are to each other; the same on every context rank."""

    count: int
    """Answers of the sequence; they are numbered from 0, in the order of its records."""
    pairs: Tensor
    """int64 `[pairs, 2]`: a better and a worse answer."""
    margins: Tensor
    """float32 `[pairs]`: by which the better one's score should lead."""
    references: Tensor
    """float32 `[count]`: the reference's log-probabilities, or `[0]` where records hold none."""


class RecordStream:
    """An endless series of packed sequences of records, each a pure function of (records, seed, index).

    Every epoch walks all records in an order of its own and fills sequence after sequence; a record that does not fit
    into what is left begins the next one. Records are never cut, so the rest of a sequence is padding, and each epoch
    begins a sequence of its own. Every record is read and encoded once at the start, for its length, and again when its
    sequence is made; only lengths are kept.

    Args:
        lines: the records.
        parse: what makes a `Record` of one; raises a ValueError that says what is wrong with it.
        rows: "labels": answers are read where they predict their tokens; "ends": at their last token.
        sequence_length: N.
        seed: of the order.
        too_long: what to do about a record of more than N rows, "refuse" or "drop".
        identity: what else decides the tokens (task, tokenizer), for the fingerprint.

    Raises:
        ValueError: a record that `parse` refuses or that is too long, with its place in the file; or none is left.
    """

    def __init__(
        self,
        lines: JsonLines,
        parse: Callable[[Mapping[str, Any]], Record],
        *,
        rows: Literal["labels", "ends"],
        sequence_length: int,
        seed: int,
        too_long: Literal["refuse", "drop"] = "refuse",
        identity: str = "",
    ) -> None:
        self.lines, self.parse, self.rows = lines, parse, rows
        self.sequence_length, self.seed = sequence_length, seed
        sizes = np.array([self._record(i).num_rows for i in range(len(lines))], dtype=np.int64)
        long = np.flatnonzero(sizes > sequence_length)
        if len(long) and too_long == "refuse":
            raise ValueError(
                f"record {long[0]} of {lines.root} takes {sizes[long[0]]} tokens, more than data.sequence_length="
                f"{sequence_length} ({len(long)} of {len(sizes)} records do). Raise it, or leave them out with "
                "task.too_long: drop."
            )
        self.dropped = len(long)
        """Records left out because they are too long."""
        self._kept = np.flatnonzero(sizes <= sequence_length)
        if not len(self._kept):
            raise ValueError(f"none of the {len(sizes)} records of {lines.root} fits into {sequence_length} tokens.")
        self._sizes = sizes[self._kept]
        self._identity = repr((identity, rows, sizes.tobytes(), sequence_length, seed))
        # Sequences of the epochs before each one.
        self._first = [0]
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        """Records that are used."""
        return len(self._kept)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all records, padding not counted."""
        return int(self._sizes.sum())

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index` of the stream, index >= 0."""
        with self._lock:
            while self._first[-1] <= index:
                self._first.append(self._first[-1] + len(self._epoch(len(self._first) - 1)))
            epoch = int(np.searchsorted(self._first, index, side="right")) - 1
            members = self._epoch(epoch)[index - self._first[epoch]]
        return self._assemble([self._record(int(i)) for i in members])

    def fingerprint(self) -> str:
        """32 hexadecimal digits of all that decides what sequence i holds."""
        parts = (self.lines.fingerprint(), self._identity)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _record(self, index: int) -> Record:
        content = self.lines.record(index)
        try:
            return self.parse(content)
        except ValueError as error:
            raise ValueError(f"record {index} of {self.lines.root}: {error}") from error

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The records of each sequence of an epoch."""
        if epoch not in self._epochs:
            # numpy promises the raw bits of a generator across versions, but not the result of its shuffle.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self))
            order = np.argsort(keys, kind="stable")
            begins, room = [], 0
            for place, size in enumerate(self._sizes[order].tolist()):
                if size > room:
                    begins.append(place)
                    room = self.sequence_length
                room -= size
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = np.split(self._kept[order], begins[1:])
        return self._epochs[epoch]

    def _assemble(self, records: list[Record]) -> PackedSequence:
        trees: list[list[Node]] = [record.nodes for record in records]
        packed = pack(trees)
        n = self.sequence_length
        read_at = packed.sequence_ids.where(packed.labels != IGNORED, -1)
        if self.rows == "ends":
            read_at = torch.full_like(packed.tokens, -1)
            read_at[packed.ends] = torch.arange(packed.ends.numel())
        return PackedSequence(
            tokens=_filled(packed.tokens, n, 0),
            labels=_filled(packed.labels, n, IGNORED),
            positions=_filled(packed.positions, n, 0),
            mask=_with_padding(packed.mask, n),
            lengths=tuple(record.num_rows for record in records),
            extra={READ_AT: _filled(read_at, n, -1)},
            about=_answers(records),
        )


def _answers(records: list[Record]) -> Answers:
    first, pairs = 0, []
    for record in records:
        pairs += [(better + first, worse + first) for better, worse in record.pairs]
        first += record.num_answers
    references = [value for record in records for value in record.references]
    return Answers(
        count=first,
        pairs=torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        margins=torch.tensor([m for record in records for m in record.margins], dtype=torch.float32),
        references=torch.tensor(references, dtype=torch.float32),
    )


def _filled(values: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.numel()), value=value)


def _with_padding(tree: FlashMask, length: int) -> FlashMask:
    """A tree's mask with tokens after it, each a document of its own: no other sees them, and each costs one score."""
    used = tree.num_rows
    # A tree's column is hidden from where its subtree ends to the last row: to the last one there is now.
    starts = torch.full((1, 1, 1, length), used, dtype=torch.int32)
    starts[:, :, : tree.num_intervals, :used] = tree.starts
    starts[..., used:] = torch.arange(used + 1, length + 1)
    return FlashMask(starts, torch.full_like(starts, length), causal=True)
