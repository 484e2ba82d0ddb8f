"""Attention over a sequence that is spread over ranks: exchange, attend and merge, stage by stage."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward, resolve_backend
from fm_longctx.attention.validation import validate
from fm_longctx.context_parallel.context import ContextParallel
from fm_longctx.context_parallel.exchange import (
    Pending,
    add_gradients_,
    pack,
    start_gradients,
    start_keys,
    unpack,
)
from fm_longctx.context_parallel.merge import merge_


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: ContextParallel,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of this rank's rows to every column that they see, wherever it lives. A collective: all ranks call it.

    Args:
        q: `[B, T, H, D]`, the rank's rows (`plan.shard(x, rank, dim=1)`), in a dtype that `flashmask_attention` takes.
        k, v: `[B, T, H_kv, D]` and `[B, T, H_kv, D_v]`, the same rows' keys and values.
        context: group, plan and mask.
        scale, backend: as in `flashmask_attention`.

    Returns:
        out `[B, T, H, D_v]` in q's dtype, the rank's rows of what `flashmask_attention` gives for the whole sequence.

    Raises:
        ValueError: inputs that do not fit together or do not have the rank's rows.

    The keys of stage s + 1 travel while stage s is attended to. Partial results are merged in float32 (float64 for
    float64 inputs) in the order of the stages; gradients of keys travel back in that dtype and are added in the order
    of stages and ranks, so the result is repeatable bit for bit. Received keys are kept for the backward; under
    activation checkpointing they are fetched again by the recomputation. torch.compile breaks the graph here.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.ndim == 4 and q.shape[1] != len(context.rows):
        raise ValueError(
            f"rank {context.rank} owns {len(context.rows)} of {context.num_tokens} positions but q has {q.shape[1]}. "
            "Pass the rank's part: plan.shard(x, rank, dim=1)."
        )
    validate(q, k, v, context.stages[0].mask)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    intervals = max(stage.mask.num_intervals for stage in context.stages)
    out: Tensor = _Attention.apply(q, k, v, context, scale, resolve_backend(backend, q, v, intervals))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, context: ContextParallel, scale: float, backend: str
    ) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        stages, group = context.stages, context.group
        received: list[Tensor] = []
        arriving: Pending | None = None
        for s, stage in enumerate(stages):
            if arriving is not None:
                received.append(arriving.wait())
            if s + 1 < len(stages):
                arriving = start_keys(stages[s + 1], k, v, _some(group))
            if s == 0:
                out, lse = attention_forward(q, k, v, stage.mask, scale=scale, backend=backend, out_dtype=exact)
            elif len(stage.columns):
                k_s, v_s = unpack(received[-1], k.shape[-1])
                part = attention_forward(q, k_s, v_s, stage.mask, scale=scale, backend=backend, out_dtype=exact)
                merge_(out, lse, *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *received)
        ctx.context, ctx.scale, ctx.backend = context, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *received = ctx.saved_tensors
        context: ContextParallel = ctx.context
        exact = torch.promote_types(q.dtype, torch.float32)
        delta = attention_delta(out, dout, backend=ctx.backend)

        def gradients(stage: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mask = context.stages[stage].mask
            return attention_backward(
                dout, q, k, v, lse, delta, mask, scale=ctx.scale, backend=ctx.backend, grad_dtype=exact
            )

        dq = torch.zeros_like(q, dtype=exact)
        returning: list[Pending] = []
        # The rank's own keys last: the gradients of the others' travel meanwhile.
        for s, keys in enumerate(received, start=1):
            k_s, v_s = unpack(keys, k.shape[-1])
            if k_s.shape[1]:
                dq_s, dk_s, dv_s = gradients(s, k_s, v_s)
                dq += dq_s
            else:
                dk_s, dv_s = k_s.to(exact), v_s.to(exact)
            returning.append(start_gradients(context.stages[s], dk_s, dv_s, _some(context.group)))
        dq_s, dk_s, dv_s = gradients(0, k, v)
        dq += dq_s
        total = pack(dk_s, dv_s)
        for stage, pending in zip(context.stages[1:], returning, strict=True):
            add_gradients_(total, stage, pending.wait())
        dk, dv = unpack(total, k.shape[-1])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _some(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A plan for more than one rank never meets a context without a group."""
    assert group is not None
    return group
