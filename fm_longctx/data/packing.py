"""Documents in a shuffled order, concatenated and cut into sequences of one length."""

from __future__ import annotations

import hashlib

import numpy as np

from fm_longctx.data.sequence import PackedSequence, assemble
from fm_longctx.data.sources import TextFiles
from fm_longctx.data.tokenizer import ByteTokenizer


class PackedStream:
    """An endless series of packed sequences, each a pure function of (documents, seed, index).

    Every epoch walks all documents in an order of its own. The documents are concatenated, epoch after epoch, and
    sequence i is the tokens `[i * N, (i + 1) * N)` of that stream: nothing is dropped, nothing is padded, and any
    sequence is found without reading those before it. So the position in the data is one integer for all ranks.

    Args:
        source: the documents.
        tokenizer: turns bytes into tokens, and byte counts into token counts.
        sequence_length: N, at least 2.
        seed: of the order of the documents.
    """

    def __init__(self, source: TextFiles, tokenizer: ByteTokenizer, *, sequence_length: int, seed: int) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2 (a token and its label), got {sequence_length}.")
        self.source, self.tokenizer = source, tokenizer
        self.sequence_length, self.seed = sequence_length, seed
        self._counts = np.array([tokenizer.count(size) for size in source.sizes], dtype=np.int64)
        self.epoch_tokens = int(self._counts.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index` of the stream, index >= 0."""
        start, stop = index * self.sequence_length, (index + 1) * self.sequence_length
        pieces: list[np.ndarray] = []
        while start < stop:
            epoch, at = divmod(start, self.epoch_tokens)
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, at, side="right"))
            document = order[place]
            first = at - int(ends[place] - self._counts[document])
            last = min(first + stop - start, int(self._counts[document]))
            pieces.append(self.tokenizer.encode(self.source.read(document))[first:last])
            start += last - first
        return assemble(pieces)

    def fingerprint(self) -> str:
        """32 hexadecimal digits of all that decides what sequence i holds."""
        parts = (self.source.fingerprint(), type(self.tokenizer).__name__, self.sequence_length, self.seed)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, and where each ends in it."""
        if epoch not in self._epochs:
            # numpy promises the raw bits of a generator across versions, but not the result of its shuffle.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self.source))
            order = np.argsort(keys, kind="stable")
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = order, self._counts[order].cumsum()
        return self._epochs[epoch]
