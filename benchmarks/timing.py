"""One timer for every competitor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
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
        (ms,) = self._repeat(lambda: kept.append(function()), 1)
        return kept[0], ms

    def finish(self, function: Callable[[], object], first_ms: float) -> Timing:
        """The timing of a function that `once` has run before, in `first_ms`."""
        (second_ms,) = self._repeat(function, 1)
        if second_ms >= self._long:
            samples = [second_ms]
        elif second_ms >= self._budget:
            samples = [first_ms, second_ms, *self._repeat(function, self._least - 2)]
        else:
            fitting = round(self._budget / max(second_ms, 1e-3))
            samples = self._repeat(function, min(self._most, max(self._least, fitting)))
        return Timing(statistics.median(samples), min(samples), max(samples), len(samples))

    def __call__(self, function: Callable[[], object]) -> Timing:
        _, first_ms = self.once(function)
        return self.finish(function, first_ms)

    def _repeat(self, function: Callable[[], object], reps: int) -> list[float]:
        if self._flush is None:
            samples = []
            for _ in range(reps):
                begin = time.perf_counter()
                function()
                samples.append(1e3 * (time.perf_counter() - begin))
            return samples
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]
