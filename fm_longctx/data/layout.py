"""Which pieces of which documents make sequence i: concatenate and cut, or best fit."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from threading import Lock
from typing import Any, Protocol

import numpy as np

from fm_longctx.data.best_fit import Piece, best_fit
from fm_longctx.data.order import Epochs, shuffled_window

_KEPT = 4


class Layout(Protocol):
    """Pieces of each sequence, found from token counts alone. Safe in threads."""

    def pieces(self, index: int) -> list[Piece]:
        """What sequence `index` holds, in order; less than a sequence where it is padded."""
        ...

    def bookmark(self, index: int) -> dict[str, Any]:
        """What `restore` needs to find sequence `index` and later ones at once."""
        ...

    def restore(self, bookmark: dict[str, Any]) -> None: ...


class Concatenated:
    """Sequence i is the tokens `[i * N, (i + 1) * N)` of all epochs, one document after the other.

    Nothing is dropped, nothing is padded, and any sequence is found without those before it.
    """

    def __init__(self, epochs: Epochs, sequence_length: int) -> None:
        self._epochs, self._length = epochs, sequence_length

    def pieces(self, index: int) -> list[Piece]:
        at, stop = index * self._length, (index + 1) * self._length
        pieces = []
        while at < stop:
            epoch, low = divmod(at, self._epochs.num_tokens)
            order, ends = self._epochs.order(epoch)
            high = min(low + stop - at, self._epochs.num_tokens)
            # The documents that have tokens in [low, high), each cut to it.
            places = slice(int(np.searchsorted(ends, low, side="right")), int(np.searchsorted(ends, high)) + 1)
            documents, last = order[places], ends[places]
            first = last - self._epochs.counts[documents]
            starts, stops = np.maximum(low, first) - first, np.minimum(high, last) - first
            found = zip(documents.tolist(), starts.tolist(), stops.tolist(), strict=True)
            pieces += [Piece(*piece) for piece in found if piece[1] < piece[2]]
            at += high - low
        return pieces

    def bookmark(self, index: int) -> dict[str, Any]:
        return {}

    def restore(self, bookmark: dict[str, Any]) -> None:
        pass


class BestFit:
    """Best-fit decreasing within windows of documents; the sequences of a window come in a shuffled order.

    Window w holds the documents that begin in the tokens `[w * S, (w + 1) * S)` of all epochs, S = window x N. It fills
    some `window` sequences, and how many is known only by packing it: to find sequence i all windows before it are
    packed (counts only, no text is read), unless a bookmark says where to begin.

    Args:
        epochs: the documents in their order.
        sequence_length: N.
        window: sequences' worth of tokens in a window, >= 1. The larger, the less padding.
    """

    def __init__(self, epochs: Epochs, sequence_length: int, window: int) -> None:
        self._epochs, self._length, self._window = epochs, sequence_length, window
        self._lock = Lock()
        self._start(0, 0)

    def pieces(self, index: int) -> list[Piece]:
        with self._lock:
            window = self._find(index)
            return self._pack(window)[index - self._firsts[window - self._base]]

    def bookmark(self, index: int) -> dict[str, Any]:
        """The window of sequence `index`, and its first sequence."""
        with self._lock:
            window = self._find(index)
            return {"window": window, "first": self._firsts[window - self._base]}

    def restore(self, bookmark: dict[str, Any]) -> None:
        with self._lock:
            self._start(int(bookmark["window"]), int(bookmark["first"]))

    def _start(self, window: int, first: int) -> None:
        self._base = window
        # The first sequence of window base, base + 1, ..., and at the end that of the window not packed yet.
        self._firsts = [first]
        self._packed: OrderedDict[int, list[list[Piece]]] = OrderedDict()

    def _find(self, index: int) -> int:
        if index < self._firsts[0]:
            self._start(0, 0)
        while index >= self._firsts[-1]:
            window = self._base + len(self._firsts) - 1
            self._firsts.append(self._firsts[-1] + len(self._pack(window)))
        # A window without a sequence shares its first with the next one.
        return self._base + bisect_right(self._firsts, index) - 1

    def _pack(self, window: int) -> list[list[Piece]]:
        if window not in self._packed:
            documents = self._documents(window)
            packed = best_fit(self._epochs.counts[documents].tolist(), self._length)
            order = shuffled_window(len(packed), self._epochs.seed, window)
            self._packed[window] = [[p._replace(document=int(documents[p.document])) for p in packed[i]] for i in order]
            while len(self._packed) > _KEPT:
                self._packed.popitem(last=False)
        return self._packed[window]

    def _documents(self, window: int) -> np.ndarray:
        """Documents that begin in the window, in order."""
        size, total = self._window * self._length, self._epochs.num_tokens
        begin, end = window * size, (window + 1) * size
        parts = []
        for epoch in range(begin // total, -(-end // total)):
            order, ends = self._epochs.order(epoch)
            # A document begins where the one before it ends; the first one at 0.
            low, high = begin - epoch * total, end - epoch * total
            first = 0 if low <= 0 else int(np.searchsorted(ends, low)) + 1
            last = int(np.searchsorted(ends, high)) + 1
            parts.append(order[first:last])
        return np.concatenate(parts)
