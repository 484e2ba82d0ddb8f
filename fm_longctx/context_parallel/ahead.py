"""Copies to a GPU that begin before they are needed: the next batch's, and its plan's, while the present one trains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """Tensors that move together."""

    def pin_memory(self: T) -> T: ...

    def to(self: T, device: torch.device) -> T:
        """A copy on the device; from pinned memory the host does not wait for it."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """All that `to` moves."""
        ...


T = TypeVar("T", bound=Movable)


class Ahead(Generic[T]):
    """A copy on a GPU of something in host memory, begun here, on a stream of its own, and waited for in `take`.

    Made in a loader's thread, which may wait; the thread that trains never does. Not while a CUDA graph is captured.
    """

    def __init__(self, item: T, device: torch.device) -> None:
        self.device = device
        pinned = item.pin_memory()
        with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
            self._copy: T = pinned.to(device)
            self._done = torch.cuda.Event()
            self._done.record(_stream(device))

    def take(self) -> T:
        """The copy, for the current stream, which waits for it; the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._done)
        for tensor in self._copy.tensors():
            # Its memory belongs to the other stream, which must not use it again before this one is done with it.
            tensor.record_stream(current)
        return self._copy


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
