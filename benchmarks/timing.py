"""One timer for every competitor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")

# What triton.testing.do_bench clears; more than the L2 of any GPU here.
FLUSH_BYTES = 256 * 2**20


class Timing(NamedTuple):
    """Milliseconds: median, least and most of `reps` repetitions."""

    ms: float
    low: float
    high: float
    reps: int


class Timer:
    """Median time of a function, the L2 cache flushed before each repetition.

    As `triton.testing.do_bench`, but the repetitions are spent where they are needed: until `budget_ms` is used, at
    least `least` of them. A call that alone takes more than the budget is run `least` times in all, its first run
    included, which may have compiled: the median of three leaves that one out. A call of more than `long_ms` averages
    over itself: it is run twice, and the second run is its time.

    On a GPU CUDA events time what the stream does, and the repetitions are queued at once, so that the host's own time
    is hidden wherever the kernels take longer. On a CPU it is wall-clock time.
    """

    def __init__(
        self,
        device: str,
        *,
        budget_ms: float = 80.0,
        least: int = 3,
        most: int = 50,
        long_ms: float = math.inf,
    ) -> None:
        if least < 3:
            raise ValueError(f"least must be 3 or more, so that a median leaves out the first run; got {least}.")
        self._cuda = torch.device(device).type == "cuda"
        self._budget, self._least, self._most, self._long = budget_ms, least, most, long_ms
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self._cuda else None

    def once(self, function: Callable[[], Result]) -> tuple[Result, float]:
        """What the function returns, and the milliseconds of this one call."""
        kept: list[Result] = []
        (ms,) = self._run([lambda: kept.append(function())])
        return kept[0], ms

    def in_turn(self, functions: Sequence[Callable[[], object]], first_ms: Sequence[float]) -> list[Timing]:
        """The timings of functions that `once` has run before, in their `first_ms`; each repeated after the others.

        A card at its limit of power runs slower for a while after whatever has drawn much of it: in turn, that meets
        all of them alike. Another one begins each round.
        """
        samples: list[list[float]] = []
        more: list[int] = []
        for first, second in zip(first_ms, self._run(functions), strict=True):
            if second >= self._long:
                samples.append([second])
                more.append(0)
            elif second >= self._budget:
                samples.append([first, second])
                more.append(self._least - 2)
            else:
                samples.append([])
                more.append(min(self._most, max(self._least, round(self._budget / max(second, 1e-3)))))
        turns = [
            which
            for turn in range(max(more, default=0))
            for place in range(len(functions))
            if turn < more[which := (turn + place) % len(functions)]
        ]
        for which, ms in zip(turns, self._run([functions[which] for which in turns]), strict=True):
            samples[which].append(ms)
        return [Timing(statistics.median(x), min(x), max(x), len(x)) for x in samples]

    def __call__(self, function: Callable[[], object]) -> Timing:
        _, first_ms = self.once(function)
        (timing,) = self.in_turn([function], [first_ms])
        return timing

    def _run(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        """Milliseconds of each of these calls, one after the other."""
        samples = []
        if self._flush is None:
            for function in functions:
                begin = time.perf_counter()
                function()
                samples.append(1e3 * (time.perf_counter() - begin))
            return samples
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in functions]
        for function, (start, end) in zip(functions, events, strict=True):
            self._flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]
