"""Whose turn which sequence is: each once, near its place, and of like area in a micro-batch."""

import doctest
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx.data import turns as module
from fm_longctx.data.turns import Turns, first_needed
from tests.properties import examples


class Areas:
    """A stream that knows nothing but areas."""

    def __init__(self, seed=0):
        self.seed = seed

    def area(self, index):
        return 1000 + int(random.Random(f"{self.seed} {index}").random() ** 4 * 10**6)


def taken(turns, n):
    """Sequences of n micro-batches, each a list of ranks."""
    return [turns.next().sequences for _ in range(n)]


def flat(batches):
    return [index for batch in batches for rank in batch for index in rank]


# One sequence a rank in a step has nothing to balance without a look-ahead, and is refused.
numbers = st.fixed_dictionaries(
    {"ranks": st.integers(1, 4), "batch_size": st.integers(1, 3), "accumulation": st.integers(1, 3)}
).filter(lambda shape: shape["batch_size"] * shape["accumulation"] > 1)


@settings(max_examples=examples(60))
@given(numbers, st.none() | st.integers(1, 40), st.integers(0, 99))
def test_a_window_is_a_permutation_of_consecutive_sequences(shape, lookahead, seed):
    turns = Turns(Areas(seed), balance="area", lookahead=lookahead, **shape)
    step = shape["ranks"] * shape["batch_size"] * shape["accumulation"]
    assert turns.window % step == 0 and (lookahead or step) <= turns.window < (lookahead or step) + step
    per_window = turns.window // (shape["ranks"] * shape["batch_size"])
    for w in range(3):
        batches = taken(turns, per_window)
        assert {(len(b), len(b[0])) for b in batches} == {(shape["ranks"], shape["batch_size"])}
        assert sorted(flat(batches)) == list(range(w * turns.window, (w + 1) * turns.window))


@settings(max_examples=examples(60))
@given(numbers, numbers, st.none() | st.integers(1, 40), st.integers(0, 12), st.sampled_from(["none", "area"]))
def test_going_on_anywhere_takes_every_sequence_once(before, after, lookahead, done, balance):
    old = Turns(Areas(), balance="area", lookahead=lookahead, **before)
    gone = flat(taken(old, done))
    new = Turns(Areas(), balance=balance, lookahead=lookahead if balance == "area" else None, **after)
    new.restore(old.state())
    assert first_needed(old.state()) == min(set(range(10_000)) - set(gone))
    later = taken(new, 60)
    assert {(len(b), *map(len, b)) for b in later} == {(after["ranks"], *[after["batch_size"]] * after["ranks"])}
    gone += flat(later)
    assert len(gone) == len(set(gone))
    # All but what the last window still holds.
    assert set(gone) | set(new.state()["pending"]) == set(range(new.state()["next_sequence"]))


@settings(max_examples=examples(40))
@given(numbers, st.none() | st.integers(1, 40), st.integers(0, 12))
def test_going_on_alike_is_as_if_never_stopped(shape, lookahead, done):
    straight = Turns(Areas(), balance="area", lookahead=lookahead, **shape)
    old = Turns(Areas(), balance="area", lookahead=lookahead, **shape)
    want = taken(straight, done + 20)
    assert taken(old, done) == want[:done]
    new = Turns(Areas(), balance="area", lookahead=lookahead, **shape)
    new.restore(old.state())
    assert taken(new, 20) == want[done:]


def test_with_one_step_ahead_each_step_keeps_its_sequences():
    turns = Turns(Areas(), ranks=4, batch_size=2, accumulation=3, balance="area")
    plain = Turns(Areas(), ranks=4, batch_size=2, accumulation=3)
    moved = 0
    for _ in range(10):
        mine, want = taken(turns, 3), taken(plain, 3)
        assert sorted(flat(mine)) == flat(want)
        moved += mine != want
    assert moved > 5


def slowest(batches, stream):
    """Sum over micro-batches of the largest rank's area, over the sum of the means."""
    areas = [[sum(stream.area(i) for i in rank) for rank in batch] for batch in batches]
    return sum(map(max, areas)) / sum(sum(a) / len(a) for a in areas)


def test_ranks_wait_less_and_less_the_further_it_looks():
    stream = Areas()
    waits = [
        slowest(taken(Turns(stream, ranks=8, batch_size=1, accumulation=4, **options), 160), stream)
        for options in (
            {},
            {"balance": "area"},
            {"balance": "area", "lookahead": 256},
        )
    ]
    assert waits[0] > 2.5 and waits[1] < 1.75 and waits[2] < 1.1


def test_steps_of_a_window_are_alike_and_shuffled():
    stream = Areas()
    turns = Turns(stream, ranks=4, batch_size=1, accumulation=8, balance="area", lookahead=32 * 16)
    steps = [sum(stream.area(i) for i in flat(taken(turns, 8))) for _ in range(16)]
    assert max(steps) / min(steps) < 1.2
    assert steps not in (sorted(steps), sorted(steps, reverse=True))


def test_a_stream_without_areas_is_asked_for_its_masks():
    class Masked:
        def sequence(self, index):
            import numpy as np

            from fm_longctx.data import assemble

            return assemble([np.zeros(n, dtype=np.int64) for n in ([8], [1] * 8, [4, 4], [8])[index % 4]])

    turns = Turns(Masked(), ranks=2, batch_size=1, accumulation=2, balance="area")
    assert {frozenset(flat([batch])) for batch in taken(turns, 2)} == {frozenset({0, 3}), frozenset({1, 2})}


def test_the_example_in_the_words():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"balance": "size"}, "balance must be none or area, got 'size'"),
        ({"lookahead": 4}, "lookahead must be at least 1 and needs balance: area, got 4 with none"),
        ({"lookahead": 0, "balance": "area"}, "lookahead must be at least 1"),
        ({"balance": "area"}, "nothing to balance: a look-ahead of 2 is one sequence for each of the 2 data ranks"),
        ({"balance": "area", "lookahead": 2}, "nothing to balance"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Turns(Areas(), **{"ranks": 2, "batch_size": 1} | options)
