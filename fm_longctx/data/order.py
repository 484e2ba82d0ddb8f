"""The order of documents: every epoch walks all of them, shuffled anew."""

from __future__ import annotations

from threading import Lock

import numpy as np

_WINDOW = 1  # keeps the draws of windows apart from those of epochs


class Epochs:
    """Documents, epoch after epoch without end. A pure function of (counts, seed); safe in threads.

    Args:
        counts: tokens of each document, int64 `[documents]`.
        seed: of every order.

    Raises:
        ValueError: no token in any document.
    """

    def __init__(self, counts: np.ndarray, seed: int) -> None:
        self.counts, self.seed = counts, seed
        self.num_tokens = int(counts.sum())
        """Tokens of an epoch."""
        if not self.num_tokens:
            raise ValueError(f"the {len(counts)} documents have no token among them.")
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = Lock()

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in their order, and where each ends in it, in tokens; int64 `[documents]` each."""
        with self._lock:
            if epoch not in self._known:
                order = shuffled(len(self.counts), self.seed, epoch)
                while len(self._known) > 1:
                    del self._known[min(self._known)]
                self._known[epoch] = order, self.counts[order].cumsum()
            return self._known[epoch]


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1, int64, the same for the same key on every machine and version.

    numpy promises the raw bits of a generator across versions, but not the result of its shuffle.
    """
    return np.argsort(np.random.PCG64(list(key)).random_raw(n), kind="stable")


def shuffled_window(n: int, seed: int, window: int) -> np.ndarray:
    """A permutation for a window of sequences; another one than any epoch's."""
    return shuffled(n, seed, window, _WINDOW)
