"""Texts that come one after the other: the same packing, and any position found again without starting over."""

import json

import pytest
import torch

from fm_longctx.data import IGNORED, ByteTokenizer, FeedStream

SIZES = [3, 40, 7, 130, 1, 64, 28]


class Repeating:
    """The same texts again and again; counts how many were asked for."""

    def __init__(self):
        self.at, self.asked = 0, 0

    def __next__(self):
        text = bytes([65 + self.at % len(SIZES)]) * SIZES[self.at % len(SIZES)]
        self.at, self.asked = self.at + 1, self.asked + 1
        return text

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]

    def fingerprint(self):
        return repr(SIZES)


def stream_of(packing, **options):
    options = {"sequence_length": 50, "seed": 1, "window": 4} | options
    return FeedStream(Repeating(), ByteTokenizer(), packing=packing, **options)


def test_concat_is_the_texts_in_their_order():
    stream = stream_of("concat")
    tokens = torch.cat([stream.sequence(i).tokens for i in range(12)]).tolist()
    want = [t for i in range(30) for t in (256, *[65 + i % 7] * SIZES[i % 7], 257)]
    assert tokens == want[:600]


def test_best_fit_is_every_text_of_a_window_once():
    stream = stream_of("best_fit")
    total = [size + 2 for size in SIZES]
    count = 0
    while sum(total[i % 7] for i in range(count)) < 4 * 50:
        count += 1
    sequences = [stream.sequence(i) for i in range(20)]
    first = [s for i, s in enumerate(sequences) if stream.bookmark(i)["window"] == 0]
    tokens = torch.cat([s.tokens[: 50 - s.num_padding] for s in first]).tolist()
    want = [t for i in range(count) for t in (256, *[65 + i] * SIZES[i], 257)]
    assert sorted(tokens) == sorted(want)
    assert all((s.labels[50 - s.num_padding :] == IGNORED).all() for s in first)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_any_bookmark_leads_on(packing):
    stream = stream_of(packing)
    want = [stream.sequence(i) for i in range(30)]
    for index in range(29):
        bookmark = json.loads(json.dumps(stream.bookmark(index)))
        other = stream_of(packing)
        other.restore(bookmark)
        assert all(torch.equal(other.sequence(i).tokens, want[i].tokens) for i in (index, index + 1))
        # At most a window is read again, and never all that came before.
        assert other.feed.asked <= 2 * 12
        assert other.bookmark(index) == bookmark
        assert stream.area(index) == int(want[index].mask.area())


def test_a_rank_that_reads_little_gives_the_same_bookmark():
    ahead, behind = stream_of("concat"), stream_of("concat")
    ahead.sequence(9)
    behind.sequence(2)
    assert ahead.bookmark(4) == behind.bookmark(4)


def test_what_is_released_is_past():
    stream = stream_of("concat")
    stream.sequence(10)
    assert stream.sequence(0).lengths
    stream.release(8)
    stream.sequence(11)
    assert stream.sequence(8).lengths and stream.bookmark(8)["first"] == 8
    with pytest.raises(ValueError, match="sequence 7 of the stream is past: the earliest one kept is 8"):
        stream.sequence(7)
    with pytest.raises(ValueError, match="is past"):
        stream.bookmark(0)


def test_fingerprint_follows_what_decides_the_sequences():
    prints = {
        stream_of("concat").fingerprint(),
        stream_of("concat", sequence_length=51).fingerprint(),
        stream_of("best_fit").fingerprint(),
        stream_of("best_fit", seed=2).fingerprint(),
        stream_of("best_fit", window=5).fingerprint(),
    }
    assert len(prints) == 5
    # The order of a feed that is only concatenated has no seed.
    assert stream_of("concat", seed=2, window=5).fingerprint() in prints


def test_a_stream_without_a_token_is_no_endless_search():
    class Nothing(ByteTokenizer):
        def encode(self, text):
            return super().encode(text)[:0]

    stream = FeedStream(Repeating(), Nothing(), sequence_length=50, seed=1)
    with pytest.raises(ValueError, match="10,000 texts have no token"):
        stream.sequence(0)
