"""Bytes as tokens."""

from __future__ import annotations

import numpy as np


class ByteTokenizer:
    """One token a byte (ids 0..255); a document begins with BOS (256) and ends with EOS (257).

    BOS lets the first byte be predicted, EOS lets the end be. A model that knows nothing has a loss of
    ln(258) = 5.553 nats a token. Token counts follow from byte counts, so nothing is read to plan the packing.
    """

    bos = 256
    eos = 257
    vocab_size = 258

    def count(self, num_bytes: int) -> int:
        """Tokens of a document of so many bytes."""
        return num_bytes + 2

    def encode(self, text: bytes) -> np.ndarray:
        """int64 `[len(text) + 2]`."""
        tokens = np.empty(len(text) + 2, dtype=np.int64)
        tokens[0], tokens[-1] = self.bos, self.eos
        tokens[1:-1] = np.frombuffer(text, dtype=np.uint8)
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        """The text of the byte tokens among these; BOS and EOS are left out."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
