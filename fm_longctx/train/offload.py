"""Activations that wait for the backward in the host's memory, copied beside the computation.

torch's `save_on_cpu` makes the host wait for every copy. Here a second stream copies, and only streams wait: while a
layer computes, its tensors leave; while a layer's backward runs, those of the layer before it return.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Below this a copy costs more than the memory is worth.
SMALLEST = 1 << 20


class Offload:
    """Makes the groups of a model; one for all its layers.

    Args:
        smallest: bytes below which a tensor stays where it is; `SMALLEST` if not given.
    """

    def __init__(self, *, smallest: int | None = None) -> None:
        self.smallest = SMALLEST if smallest is None else smallest
        self.moved = 0
        """Tensors that have left so far."""
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[Group] | None = None
        self._leaving: list[tuple[Tensor, torch.cuda.Event]] = []

    def group(self) -> Group:
        """A group for the layer that runs next."""
        group = Group(self, None if self._last is None else self._last())
        self._last = weakref.ref(group)
        self.let_go()
        return group

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of the copies."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def hold(self, tensor: Tensor, copied: torch.cuda.Event) -> None:
        """Keep a tensor until the computation has waited for its copy."""
        self._leaving.append((tensor, copied))

    def let_go(self) -> None:
        """Free what has left."""
        # The computing stream waits for the copies of the layer before, which mostly are long done. What is freed
        # after that may be written over at once. `record_stream` would free it later than the host allocates: a host
        # far ahead of its device would find the memory of all layers taken.
        for tensor, copied in self._leaving:
            torch.cuda.current_stream(tensor.device).wait_event(copied)
        self._leaving.clear()


class Group:
    """What one layer leaves for its backward. The groups before it return first, one ahead."""

    def __init__(self, offload: Offload, before: Group | None) -> None:
        self.offload = offload
        self.before = None if before is None else weakref.ref(before)
        self.items: list[weakref.ref[_Offloaded]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """Inside, autograd's saved tensors belong to the group."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """The tensor, or where it has gone."""
        if tensor.numel() * tensor.element_size() < self.offload.smallest or isinstance(tensor, torch.nn.Parameter):
            return tensor
        item = _Offloaded(tensor, self)
        self.offload.moved += 1
        self.items.append(weakref.ref(item))
        return item

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """The tensor on its device; what the layer before will need starts to return."""
        if isinstance(packed, Tensor):
            return packed
        item: _Offloaded = packed
        item.group.offload.let_go()
        tensor = item.take()
        before = None if item.group.before is None else item.group.before()
        if before is not None:
            before.start()
        return tensor

    def start(self) -> None:
        """Bring everything back, without waiting."""
        for reference in self.items:
            item = reference()
            if item is not None:
                item.start()


class _Offloaded:
    """A tensor's copy on the host."""

    def __init__(self, tensor: Tensor, group: Group) -> None:
        self.group, self.device = group, tensor.device
        on_gpu = tensor.is_cuda
        # Strides are kept: attention saves transposed views.
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        self.arriving: tuple[Tensor, torch.cuda.Event] | None = None
        self.started = False
        if not on_gpu:
            self.host.copy_(tensor)
            return
        stream = group.offload.stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        group.offload.hold(tensor, copied)

    def start(self) -> None:
        if self.device.type == "cpu" or self.started:
            return
        self.started = True
        stream = self.group.offload.stream(self.device)
        current = torch.cuda.current_stream(self.device)
        # Taken from the computing stream's memory, where it will be freed too; written after what used it before.
        tensor = torch.empty_like(self.host, device=self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            tensor.copy_(self.host, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        self.arriving = (tensor, copied)

    def take(self) -> Tensor:
        if self.device.type == "cpu":
            return self.host.clone()
        if self.arriving is None:
            self.started = False
            self.start()
        assert self.arriving is not None
        (tensor, copied), self.arriving = self.arriving, None
        torch.cuda.current_stream(self.device).wait_event(copied)
        return tensor
