"""The op as PyTorch knows it: registered with torch.library, so that compile, export and autograd see one node.

Such ops take tensors, so a mask crosses as its intervals and the schedules that the kernels will read, and is put
together again on the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fm_longctx.attention.passes import (
    attention_backward,
    attention_delta,
    attention_forward,
    build_schedules,
    load_backend,
)
from fm_longctx.mask import FlashMask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    scale: float,
    softcap: float | None,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Differentiable out `[B, N_q, H, D_v]` and lse `[B, H, N_q]`; the arguments are valid and the backend is named."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keys, built = build_schedules(q, v, mask, backend=backend, backward=backward, deterministic=deterministic)
    if _is_plain(q, k, v):
        eager: tuple[Tensor, Tensor] = _Eager.apply(q, k, v, mask, scale, softcap, backend, deterministic)
        return eager
    schedules: list[Tensor] = [part for schedule in built for part in schedule]
    flat_keys = [int(part) for key in keys for part in key]
    return _forward(
        q, k, v, mask.starts, mask.ends, schedules, flat_keys, mask.causal, scale, softcap, backend, deterministic
    )


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nobody looks on: no compiler, transform or dispatch mode, no subclass, no meta device.

    Then the registered op would do nothing but cost time: its way takes as long as the kernels of a short sequence.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" for x in tensors)
    )


class _Eager(torch.autograd.Function):
    """The op without its registration."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: FlashMask,
        scale: float,
        softcap: float | None,
        backend: str,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(q, k, v, mask, scale=scale, softcap=softcap, backend=backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.mask, ctx.options = mask, (scale, softcap, backend, deterministic)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, softcap, backend, deterministic = ctx.options
        dout = torch.zeros_like(out) if dout is None else dout
        delta = attention_delta(out, dout, dlse, backend=backend)
        grads = attention_backward(
            dout,
            q,
            k,
            v,
            lse,
            delta,
            ctx.mask,
            scale=scale,
            softcap=softcap,
            backend=backend,
            deterministic=deterministic,
        )
        return *grads, None, None, None, None, None


def _mask(
    q: Tensor,
    starts: Tensor,
    ends: Tensor,
    schedules: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    backend: str,
) -> FlashMask:
    mask = FlashMask.from_canonical(starts, ends, causal=causal, num_rows=q.shape[1])
    kind = load_backend(backend).Schedule
    size = len(kind._fields)
    for i in range(len(keys) // 3):
        block_m, block_n, by_row = keys[3 * i : 3 * i + 3]
        mask.cache[kind, block_m, block_n, bool(by_row)] = kind(*schedules[i * size : (i + 1) * size])
    return mask


@torch.library.custom_op("fm_longctx::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    schedules: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    mask = _mask(q, starts, ends, schedules, keys, causal, backend)
    return attention_forward(q, k, v, mask, scale=scale, softcap=softcap, backend=backend)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    schedules: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    b, n_q, h, _ = q.shape
    out = q.new_empty((b, n_q, h, v.shape[-1]))
    return out, q.new_empty((b, h, n_q), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("fm_longctx::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    schedules: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(q, starts, ends, schedules, keys, causal, backend)
    delta = attention_delta(out, dout, dlse, backend=backend)
    return attention_backward(
        dout,
        q,
        k,
        v,
        lse,
        delta,
        mask,
        scale=scale,
        softcap=softcap,
        backend=backend,
        deterministic=deterministic,
    )


@_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    schedules: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ends, schedules, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends, *schedules)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, starts, ends, *schedules = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = _backward(dout, dlse, q, k, v, out, lse, starts, ends, schedules, *ctx.settings)
    return dq, dk, dv, None, None, [None] * len(schedules), *[None] * len(ctx.settings)


_forward.register_autograd(_differentiate, setup_context=_save)
