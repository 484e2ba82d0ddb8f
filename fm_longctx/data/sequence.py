"""One packed sequence, what makes it from pieces of documents, and what a series of them has to offer a loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fm_longctx.mask import FlashMask

IGNORED = -100
"""A label that is not predicted: the value that torch's cross-entropy ignores by default."""

PADDING_TOKEN = 0
"""What fills a sequence. Any token would do: nothing sees it but itself, and it predicts nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSequence:
    """One sequence of N tokens with the mask that its parts ask for. `assemble` makes one of documents."""

    tokens: Tensor
    """int64 `[N]`."""
    labels: Tensor
    """int64 `[N]`, shifted already: what the token predicts, `IGNORED` where that is nothing."""
    positions: Tensor
    """int64 `[N]`, restarting with each part."""
    mask: FlashMask
    """N rows, N columns, batch 1, on the CPU; any mask."""
    lengths: tuple[int, ...]
    """Tokens of each part, in order; the rest of the N is padding, at the end."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else a loss needs for each token, `[N]`; sharded as the tokens are. The same names in all sequences."""
    about: Any = None
    """Whatever else a loss needs of the sequence as a whole, the same on every context rank."""

    @property
    def num_padding(self) -> int:
        """Tokens that are there only to fill the sequence."""
        return self.tokens.numel() - sum(self.lengths)


def assemble(pieces: Sequence[np.ndarray], *, sequence_length: int | None = None) -> PackedSequence:
    """Pieces of documents, each integers `[n]` with n >= 1, side by side; each sees itself only, causally.

    A piece's last token predicts nothing. Labels are shifted here, before anything is sharded. What is left of
    `sequence_length` (their sum if not given) is padding: tokens without a label at position 0, each a document of its
    own, so that no other sees it and it costs one score.
    """
    lengths = tuple(len(piece) for piece in pieces)
    used = sum(lengths)
    total = used if sequence_length is None else sequence_length
    assert used <= total and min(lengths, default=1) > 0
    tokens = torch.full((total,), PADDING_TOKEN)
    positions = torch.zeros(total, dtype=torch.int64)
    labels = torch.full((total,), IGNORED)
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        tokens[begin:end] = torch.from_numpy(piece.astype(np.int64, copy=False))
        positions[begin:end] = torch.arange(end - begin)
        labels[begin : end - 1] = tokens[begin + 1 : end]
        begin = end
    return PackedSequence(
        tokens=tokens,
        labels=labels,
        positions=positions,
        mask=FlashMask.from_position_ids(positions),
        lengths=lengths,
    )


class Stream(Protocol):
    """An endless series of packed sequences of one length."""

    @property
    def sequence_length(self) -> int:
        """N."""
        ...

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index` >= 0: always the same one. Several threads may ask at once."""
        ...

    def fingerprint(self) -> str:
        """What decides the sequences, in few characters: a saved position belongs to one fingerprint."""
        ...
