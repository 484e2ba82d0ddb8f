"""Attention that activation checkpointing does not repeat: its output, LSE and received keys outlive the forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from fm_longctx.train.offload import Group


class _View(NamedTuple):
    """A tensor that attention saved and that lies in the storage of one of its inputs."""

    which: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class KeptAttention:
    """One layer's attention in one forward: run by the first call, remembered by those of a recomputation.

        kept = KeptAttention()
        checkpoint(layer, hidden, once=kept, use_reentrant=False)

    Inside, the layer calls `kept(flashmask_attention, q, k, v, mask)` or the same of `context_parallel_attention`. What
    the op saves for its backward is kept, but for what lies in q, k or v: those are computed again with the rest of the
    layer. So the backward repeats no attention, and no exchange of keys between context ranks either.

    The op's own backward runs once: a second `backward` through the same graph raises a RuntimeError.

    Args:
        offload: where kept tensors wait for the backward, if not on their device.
    """

    def __init__(self, offload: Group | None = None) -> None:
        self.offload = offload
        self._outputs: list[Any] | None = None
        self._edges: tuple[list[GradientEdge], list[GradientEdge]] | None = None
        self._inputs: Sequence[Tensor] = ()
        self._packed: dict[tuple[Any, ...], Any] = {}
        self._returned: dict[int, Tensor] = {}
        self._single = True

    def __call__(self, op: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        """What `op(q, k, v, *args, **options)` returns, a tensor or several."""
        if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad or v.requires_grad):
            return op(q, k, v, *args, **options)
        outputs = _Once.apply(self, lambda *qkv: op(*qkv, *args, **options), q, k, v)
        return outputs[0] if self._single else outputs

    def run(self, op: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs: of the op at the first call, of memory afterwards."""
        if self._edges is None:
            return self._record(op, inputs)
        if self._outputs is None:
            raise RuntimeError("the backward through this attention has run: what it kept is gone.")
        for packed in self._outputs:
            # The backward of the op, soon after, will want the same: what was offloaded returns once.
            self._returned[id(packed)] = self._unpack(packed)
        return tuple(self._returned[id(packed)].detach() for packed in self._outputs)

    def _record(self, op: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # Not leaves: a leaf's node would hold the tensor, and with it what is to be computed again.
        root = inputs[0].new_empty(0, requires_grad=True)
        with torch.enable_grad():
            self._inputs = [_Entry.apply(x.detach(), root) for x in inputs]
            with saved_tensors_hooks(self._pack, self._unpack):
                outputs = op(*self._inputs)
        self._single = isinstance(outputs, Tensor)
        results = [outputs] if self._single else list(outputs)
        starts = [get_gradient_edge(x) for x in self._inputs]
        self._edges = ([get_gradient_edge(x) for x in results], starts)
        self._outputs = [self._pack(x) for x in results]
        self._inputs, self._packed = (), {}
        return tuple(x.detach() for x in results)

    def gradients(self, inputs: Sequence[Tensor], of_outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, given those of the outputs. The inputs are the recomputed ones.

        Raises:
            RuntimeError: at a second call.
        """
        if self._edges is None or self._outputs is None:
            raise RuntimeError("the backward through this attention has run already: what it kept is gone.")
        (ends, starts), self._outputs = self._edges, None
        used = [(end, grad) for end, grad in zip(ends, of_outputs, strict=True) if grad is not None]
        if not used:
            return (None,) * len(inputs)
        self._inputs = inputs
        grads = torch.autograd.grad([end for end, _ in used], starts, [grad for _, grad in used], allow_unused=True)
        self._inputs = ()
        self._returned.clear()
        return grads

    def _pack(self, x: Tensor) -> Any:
        for which, source in enumerate(self._inputs):
            if x.numel() and x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
                offset = int(x.storage_offset() - source.storage_offset())
                return _View(which, tuple(x.shape), x.stride(), offset)
        # Integers are the mask's, shared by all layers.
        if self.offload is None or not x.is_floating_point():
            return x.detach()
        # The output is saved and returned: one copy serves both.
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
        if key not in self._packed:
            # Held, so that no other tensor takes the address meanwhile.
            self._packed[key] = (self.offload.pack(x.detach()), x.detach())
        return self._packed[key][0]

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _View):
            source = self._inputs[packed.which]
            return source.as_strided(packed.size, packed.stride, source.storage_offset() + packed.offset)
        if isinstance(packed, Tensor):
            return packed
        returned = self._returned.get(id(packed))
        return Group.unpack(packed) if returned is None else returned


class _Entry(torch.autograd.Function):
    """Its output is x, with a node of its own that holds nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: KeptAttention, op: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = kept.run(op, inputs)
        ctx.save_for_backward(*inputs)
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, *ctx.kept.gradients(ctx.saved_tensors, grads)
