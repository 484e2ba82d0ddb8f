"""An MLP over a few tokens at a time: it treats every token alone, so its wide inside need never exist for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class ChunkedMLP:
    """`mlp.forward` in chunks of tokens, each computed again in the backward.

    What is kept is the input. In the backward the inside of one chunk exists at a time, and the gradients of the
    weights are added over the chunks in float32 (float64 for float64 weights) and rounded once, which needs that much
    memory for one layer's MLP. Inside an activation checkpoint it costs no third computation: the recomputation of the
    layer ends where the input is saved, before the MLP.

    Args:
        mlp: token-wise, without buffers that it changes; takes and returns `[..., C]`.
        chunk: tokens at a time, at least 1.
    """

    def __init__(self, mlp: nn.Module, chunk: int) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}.")
        self.mlp, self.forward, self.chunk = mlp, mlp.forward, chunk

    def __call__(self, x: Tensor) -> Tensor:
        names, weights = zip(*self.mlp.named_parameters(), strict=True)
        saved = _Save.apply(x, *weights)
        out: Tensor = _Chunks.apply(self, names, saved, x, *weights)
        return out

    def part(self, names: tuple[str, ...], weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """The MLP with these weights."""
        # The module's forward is this object by now: call the one that it had.
        replaced, self.mlp.forward = self.mlp.forward, self.forward
        try:
            out: Tensor = functional_call(self.mlp, dict(zip(names, weights, strict=True)), (x,))
        finally:
            self.mlp.forward = replaced
        return out


class _Save(torch.autograd.Function):
    """Holds tensors for the backward of another node; apart from it, so that they are saved before it computes."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = len(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mlp: ChunkedMLP, names: tuple[str, ...], saved: Tensor, x: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.mlp, ctx.names, ctx.saver = mlp, names, saved.grad_fn
        rows = x.flatten(0, -2)
        out = torch.empty_like(rows)
        for part, into in zip(rows.split(mlp.chunk), out.split(mlp.chunk), strict=True):
            into.copy_(mlp.part(names, weights, part))
        return out.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mlp: ChunkedMLP = ctx.mlp
        x, *weights = ctx.saver.saved_tensors
        needed = [weight.requires_grad for weight in weights]
        inputs = [weight.detach().requires_grad_(need) for weight, need in zip(weights, needed, strict=True)]
        wanted = [weight for weight in inputs if weight.requires_grad]
        exact = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in wanted]
        rows, d_rows = x.detach().flatten(0, -2), grad.flatten(0, -2)
        d_x = torch.empty_like(rows)
        for part, d_part, into in zip(*(t.split(mlp.chunk) for t in (rows, d_rows, d_x)), strict=True):
            part.requires_grad_()
            with torch.enable_grad():
                out = mlp.part(ctx.names, tuple(inputs), part)
            first, *others = torch.autograd.grad(out, [part, *wanted], d_part)
            into.copy_(first)
            for total, other in zip(exact, others, strict=True):
                total.add_(other)
        rounded = iter(total.to(w.dtype) for total, w in zip(exact, wanted, strict=True))
        return None, None, None, d_x.view_as(x), *(next(rounded) if need else None for need in needed)
