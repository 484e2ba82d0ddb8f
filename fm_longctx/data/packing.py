"""Documents packed into an endless series of sequences of one length."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from fm_longctx.data.documents import Documents
from fm_longctx.data.layout import BestFit, Concatenated, Layout
from fm_longctx.data.order import Epochs
from fm_longctx.data.sequence import PackedSequence, assemble

Packing = Literal["concat", "best_fit"]


class PackedStream:
    """A series of packed sequences, each a pure function of (documents, packing, seed, index).

    Every epoch walks all documents in an order of its own. `concat` puts them one after the other, epoch after epoch,
    and cuts that into sequences: nothing is padded, and a document may be cut at a sequence's end. `best_fit` cuts only
    documents longer than a sequence, and pads. Either way every token of every document is there once an epoch, and a
    sequence is found without reading the text of those before it: the position in the data is one integer.

    Args:
        documents: the documents, as tokens.
        sequence_length: N, at least 2.
        seed: of the order of the documents.
        packing: concat or best_fit.
        window: for best_fit: sequences' worth of tokens among which documents are fitted.
    """

    def __init__(
        self, documents: Documents, *, sequence_length: int, seed: int, packing: Packing = "concat", window: int = 64
    ) -> None:
        check_packing(sequence_length, packing, window)
        self.documents, self.sequence_length = documents, sequence_length
        self._identity = (sequence_length, seed, *((packing, window) if packing == "best_fit" else ()))
        epochs = Epochs(documents.counts, seed)
        self.epoch_tokens = epochs.num_tokens
        self.layout: Layout
        if packing == "concat":
            self.layout = Concatenated(epochs, sequence_length)
        else:
            self.layout = BestFit(epochs, sequence_length, window)

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index` of the stream, index >= 0."""
        pieces = [self.documents.tokens(*piece) for piece in self.layout.pieces(index)]
        return assemble(pieces, sequence_length=self.sequence_length)

    def area(self, index: int) -> int:
        """Unmasked scores of sequence `index`, from token counts alone: no text is read."""
        return area_of([piece.length for piece in self.layout.pieces(index)], self.sequence_length)

    def fingerprint(self) -> str:
        """32 hexadecimal digits of all that decides what sequence i holds."""
        parts = (self.documents.fingerprint(), *self._identity)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def bookmark(self, index: int) -> dict[str, Any]:
        """What spares `restore` the packing of what came before sequence `index`."""
        return self.layout.bookmark(index)

    def restore(self, bookmark: dict[str, Any]) -> None:
        """Go on from a bookmark of a stream of the same fingerprint; sequences before it can still be asked for."""
        self.layout.restore(bookmark)


def area_of(lengths: list[int], sequence_length: int) -> int:
    """Unmasked scores of causal documents of these lengths, and of the padding behind them."""
    return sum(n * (n + 1) // 2 for n in lengths) + sequence_length - sum(lengths)


def check_packing(sequence_length: int, packing: str, window: int) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2 (a token and its label), got {sequence_length}.")
    if packing not in ("concat", "best_fit"):
        raise ValueError(f"packing must be concat or best_fit, got {packing!r}.")
    if window < 1:
        raise ValueError(f"window must be at least 1 sequence, got {window}.")
