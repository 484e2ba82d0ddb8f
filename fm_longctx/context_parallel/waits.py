"""How long attention stood still for an exchange: the part of the traffic that nothing hid."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitClock:
    """Adds up the waits of a device's exchanges, forward and backward, while `measuring` is open."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def around(self, device: torch.device) -> Iterator[None]:
        """Measure one wait: on a GPU the time its stream stands still, by events and without holding up the host."""
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(device)
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call. On a GPU it waits for the last wait to end: call it when the step is over."""
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in events) / 1000
        self._seconds = 0.0
        return seconds


_clock: WaitClock | None = None


@contextmanager
def measuring() -> Iterator[WaitClock]:
    """While it is open, every wait of this process goes to the clock it gives. Measuring changes no result."""
    global _clock
    before, _clock = _clock, WaitClock()
    try:
        yield _clock
    finally:
        _clock = before


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """What `exchange` puts around a wait; nothing, unless someone measures."""
    if _clock is None:
        yield
    else:
        with _clock.around(device):
            yield
