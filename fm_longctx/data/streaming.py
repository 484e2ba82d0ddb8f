"""Packed sequences of texts that can only be read one after the other."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np

from fm_longctx.data.best_fit import best_fit
from fm_longctx.data.order import shuffled_window
from fm_longctx.data.packing import Packing, area_of, check_packing
from fm_longctx.data.sequence import PackedSequence, assemble
from fm_longctx.data.tokenizer import Tokenizer

_MOST_EMPTY = 10_000


class Feed(Protocol):
    """Texts without end, one after the other."""

    def __next__(self) -> bytes:
        """UTF-8."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the next text comes from; what JSON can hold."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _Window:
    """Sequences that were packed together, and how to pack them again."""

    start: dict[str, Any]
    """A bookmark of its first sequence."""
    first: int
    """Index of its first sequence."""
    sequences: list[list[np.ndarray]]


class FeedStream:
    """Packed sequences of a feed. Every rank reads the whole feed, so the series does not depend on their number.

    `concat` keeps the feed's order: sequence i is the tokens `[i * N, (i + 1) * N)`. `best_fit` reads documents of
    `window` sequences' worth at a time, fits them, and shuffles the sequences of the window. Sequences are made in
    order and kept until they are released; one from before those is an error. To go on elsewhere, restore a bookmark:
    reading starts at most a window before the sequence, not at the feed's start.

    Args:
        feed: the texts.
        tokenizer: makes tokens of them.
        sequence_length: N, at least 2.
        seed: of the order of the sequences of a window.
        packing, window: as in `PackedStream`. A window's tokens are held in memory, 8 bytes each.
    """

    def __init__(
        self,
        feed: Feed,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        packing: Packing = "concat",
        window: int = 64,
    ) -> None:
        check_packing(sequence_length, packing, window)
        self.feed, self.tokenizer = feed, tokenizer
        self.sequence_length, self.seed = sequence_length, seed
        self.packing, self.window = packing, window
        self._lock = Lock()
        self._windows: deque[_Window] = deque()
        self._next, self._number, self._needed = 0, 0, 0
        # concat: what a sequence left of a document, where that document is in the feed, and how much of it is used.
        self._rest: np.ndarray | None = None
        self._rest_state: dict[str, Any] = {}
        self._used = 0

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index`, reading on as far as needed."""
        with self._lock:
            pieces = self._pieces(index)
        return assemble(pieces, sequence_length=self.sequence_length)

    def area(self, index: int) -> int:
        """Unmasked scores of sequence `index`; reads on as far as needed."""
        with self._lock:
            pieces = self._pieces(index)
        return area_of([len(piece) for piece in pieces], self.sequence_length)

    def fingerprint(self) -> str:
        """32 hexadecimal digits of feed, tokenizer and packing."""
        parts: tuple[Any, ...] = (
            self.feed.fingerprint(),
            self.tokenizer.fingerprint(),
            self.sequence_length,
            self.packing,
        )
        if self.packing == "best_fit":
            parts += (self.seed, self.window)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def bookmark(self, index: int) -> dict[str, Any]:
        """Where to read from to come to sequence `index`; the same on every rank."""
        with self._lock:
            while self._next < index:
                self._read()
            for window in self._windows:
                if window.first <= index < window.first + len(window.sequences):
                    return window.start
            if index != self._next:
                raise ValueError(self._gone(index))
            return self._here()

    def release(self, index: int) -> None:
        """No sequence before `index` will be asked for again."""
        # Without the lock, which a thread may hold while it reads: the next window takes note.
        self._needed = index

    def restore(self, bookmark: dict[str, Any]) -> None:
        """Go on where a bookmark says."""
        with self._lock:
            self._windows.clear()
            self._next = self._needed = int(bookmark["first"])
            self._number = int(bookmark["window"])
            self.feed.restore(bookmark["feed"])
            self._rest, self._used = None, 0
            if bookmark["used"]:
                self._rest_state, self._rest = self.feed.state(), self._document()
                self._used = int(bookmark["used"])

    def _here(self) -> dict[str, Any]:
        """A bookmark of the next window to read."""
        cut = self._rest is not None
        return {
            "feed": self._rest_state if cut else self.feed.state(),
            "used": self._used if cut else 0,
            "first": self._next,
            "window": self._number,
        }

    def _pieces(self, index: int) -> list[np.ndarray]:
        while self._next <= index:
            self._read()
        for window in self._windows:
            if window.first <= index < window.first + len(window.sequences):
                return window.sequences[index - window.first]
        raise ValueError(self._gone(index))

    def _gone(self, index: int) -> str:
        first = self._windows[0].first if self._windows else self._next
        return (
            f"sequence {index} of the stream is past: the earliest one kept is {first}. A stream is read in order; "
            "restore a bookmark to go back."
        )

    def _read(self) -> None:
        """The next window, behind the others; those that are released go."""
        while self._windows and self._windows[0].first + len(self._windows[0].sequences) <= self._needed:
            self._windows.popleft()
        start, first = self._here(), self._next
        sequences = [self._concatenated()] if self.packing == "concat" else self._fitted()
        self._windows.append(_Window(start=start, first=first, sequences=sequences))
        self._next, self._number = first + len(sequences), self._number + 1

    def _document(self) -> np.ndarray:
        """The next one that has a token, int64 `[tokens]`."""
        for _ in range(_MOST_EMPTY):
            tokens = self.tokenizer.encode(next(self.feed))
            if len(tokens):
                return tokens
        raise ValueError(f"the stream's last {_MOST_EMPTY:,} texts have no token. Look at its text field.")

    def _concatenated(self) -> list[np.ndarray]:
        pieces, room = [], self.sequence_length
        while room:
            if self._rest is None:
                self._rest_state, self._used = self.feed.state(), 0
                self._rest = self._document()
            piece = self._rest[self._used : self._used + room]
            pieces.append(piece)
            self._used += len(piece)
            room -= len(piece)
            if self._used == len(self._rest):
                self._rest = None
        return pieces

    def _fitted(self) -> list[list[np.ndarray]]:
        documents, total = [], 0
        while total < self.window * self.sequence_length:
            documents.append(self._document())
            total += len(documents[-1])
        packed = best_fit([len(tokens) for tokens in documents], self.sequence_length)
        order = shuffled_window(len(packed), self.seed, self._number)
        return [[documents[p.document][p.start : p.stop] for p in packed[i]] for i in order]
