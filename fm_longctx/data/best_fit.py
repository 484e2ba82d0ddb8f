"""Best-fit decreasing: pieces of documents into sequences, with little left over."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens `[start, stop)` of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Put documents (by their index in `lengths`) into as few sequences of `capacity` tokens as best fit finds.

    A document longer than `capacity` is cut into pieces of that many tokens and a rest; nothing else is cut, and
    nothing is dropped. The longest piece goes first, each into the sequence that it fills best. Empty documents vanish.

    >>> [[piece.length for piece in pieces] for pieces in best_fit([5, 12, 3, 4, 2], 8)]
    [[8], [5, 3], [4, 4], [2]]
    """
    pieces = [
        Piece(document, start, min(start + capacity, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]
    pieces.sort(key=lambda piece: -piece.length)
    sequences: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, sequence), ascending; full ones are gone
    for piece in pieces:
        at = bisect_left(rooms, (piece.length, -1))
        if at < len(rooms):
            room, sequence = rooms.pop(at)
            sequences[sequence].append(piece)
        else:
            room, sequence = capacity, len(sequences)
            sequences.append([piece])
        if room > piece.length:
            insort(rooms, (room - piece.length, sequence))
    return sequences
