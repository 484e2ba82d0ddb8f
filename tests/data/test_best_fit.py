"""Best fit: every token once, only long documents cut, little left over."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx.data import best_fit as module
from fm_longctx.data.best_fit import Piece, best_fit
from tests.properties import examples


@settings(max_examples=examples(200))
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(2, 16))
def test_every_token_once_and_no_sequence_too_full(lengths, capacity):
    sequences = best_fit(lengths, capacity)
    pieces = sorted(piece for pieces in sequences for piece in pieces)
    for document, length in enumerate(lengths):
        own = [p for p in pieces if p.document == document]
        assert [t for p in own for t in range(p.start, p.stop)] == list(range(length))
        # Cut only where a sequence is full.
        assert len(own) == -(-length // capacity)
    used = [sum(piece.length for piece in pieces) for pieces in sequences]
    assert all(0 < total <= capacity for total in used)
    # Any two sequences hold more than one could: at most one is half empty.
    assert all(a + b > capacity for i, a in enumerate(used) for b in used[:i])


def test_the_fullest_sequence_that_has_room_gets_the_piece():
    assert best_fit([6, 5, 4, 3], 10) == [
        [Piece(0, 0, 6), Piece(2, 0, 4)],
        [Piece(1, 0, 5), Piece(3, 0, 3)],
    ]
    assert best_fit([7, 6, 3], 10)[0] == [Piece(0, 0, 7), Piece(2, 0, 3)]
    assert best_fit([], 10) == best_fit([0, 0], 10) == []


def test_the_example_in_the_words():
    assert doctest.testmod(module).failed == 0


def test_far_fewer_padding_tokens_than_documents_alone():
    lengths = [1 + (i * 7919) % 900 for i in range(2000)]
    sequences = best_fit(lengths, 1000)
    assert sum(lengths) / (1000 * len(sequences)) == pytest.approx(1.0, abs=0.01)
