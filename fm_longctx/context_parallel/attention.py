"""Attention over a sequence that is spread over ranks: exchange, attend and merge, stage by stage."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx.attention.passes import (
    attention_backward,
    attention_delta,
    attention_forward,
    build_schedules,
    resolve_backend,
    torch_is_strict,
)
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
from fm_longctx.context_parallel.heads import check_heads, to_heads, to_rows
from fm_longctx.context_parallel.merge import merge_
from fm_longctx.context_parallel.stages import Stage
from fm_longctx.mask import FlashMask


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: ContextParallel,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    refetch: bool = False,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor: ...


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: ContextParallel,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    refetch: bool = False,
    backend: str | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]: ...


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: ContextParallel,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    refetch: bool = False,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's rows to every column that they see, wherever it lives. A collective: all ranks call it.

    Args:
        q: `[B, T, H, D]`, the rank's rows (`plan.shard(x, rank, dim=1)`), in a dtype that `flashmask_attention` takes.
        k, v: `[B, T, H_kv, D]` and `[B, T, H_kv, D_v]`, the same rows' keys and values.
        context: group, plan and mask.
        scale, softcap, return_lse, backend, deterministic: as in `flashmask_attention`.
        refetch: fetch the keys of other ranks again in the backward instead of keeping them: the forward's traffic
            twice, and no memory for received keys between the two.

    Returns:
        out `[B, T, H, D_v]` in q's dtype, the rank's rows of what `flashmask_attention` gives for the whole sequence;
        with `return_lse` also their lse `[B, H, T]`, float32 and differentiable.

    Raises:
        ValueError: inputs that do not fit together or do not have the rank's rows, or (with the context's `check`) that
            differ between ranks, which are named.
        RuntimeError: a rank is gone, or did not come within the group's timeout.

    The keys of later stages travel while stage s is attended to. Partial results are merged in float32 (float64 for
    float64 inputs) in the order of the stages; gradients of keys travel back in that dtype and are added in the order
    of stages and ranks. So the exchange is repeatable bit for bit, and with `deterministic` everything is. Stages
    without a visible score run no kernel. Received keys are kept for the backward unless `refetch`; under activation
    checkpointing they are fetched again by the recomputation in any case. torch.compile breaks the graph here.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    context.agree(f"{_words(q)} for q, {_words(k)} for k, {_words(v)} for v, refetch={refetch}")
    if q.ndim == 4 and q.shape[1] != len(context.rows):
        raise ValueError(
            f"rank {context.rank} owns {len(context.rows)} of {context.num_tokens} positions but q has {q.shape[1]}. "
            "Pass the rank's part: plan.shard(x, rank, dim=1)."
        )
    if context.members > 1 and q.ndim == k.ndim == v.ndim == 4:
        validate(q, k, v, FlashMask.from_lengths([q.shape[1]]).to(q.device))
        check_heads(q.shape[2], k.shape[2], context.members)
        stages = context.stages_of(q.shape[2], k.shape[2])
        q, k, v = (to_heads(x, context) for x in (q, k, v))
    else:
        stages = context.stages
    validate(q, k, v, stages[0].mask)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}.")
    intervals = max(stage.mask.num_intervals for stage in stages)
    cap = None if softcap is None else float(softcap)
    options: dict[str, Any] = dict(scale=scale, softcap=cap, backend=resolve_backend(backend, q, v, intervals, cap))
    strict = deterministic or torch_is_strict()
    out: Tensor
    lse: Tensor
    out, lse = _Attention.apply(q, k, v, stages, context.group, refetch, strict, options)
    if context.members > 1:
        out = to_rows(out, context)
        if return_lse:
            # As if it were values of one number each.
            lse = to_rows(lse.transpose(1, 2)[..., None], context)[..., 0].transpose(1, 2)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stages: tuple[Stage, ...],
        group: dist.ProcessGroup | None,
        refetch: bool,
        deterministic: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        received: list[Tensor] = []
        out = lse = None
        left = sum(stage.area > 0 for stage in stages)
        backward = any(ctx.needs_input_grad[:3])
        # Keys that are kept have their memory anyway: all start now, so that the link never waits for attention.
        arriving = _arrivals(stages[1:], k, v, group, ahead=1 if refetch else len(stages))
        for stage, keys in chain([(stages[0], None)], arriving):
            if keys is not None and not refetch:
                received.append(keys)
            if not stage.area:
                continue
            left -= 1
            k_s, v_s = (k, v) if keys is None else unpack(keys, k.shape[-1])
            # What nothing is merged into any more is rounded where it is made.
            only = out is None and not left
            build_schedules(
                q, v, stage.mask, backend=options["backend"], backward=backward, deterministic=deterministic
            )
            part, part_lse = attention_forward(q, k_s, v_s, stage.mask, out_dtype=q.dtype if only else exact, **options)
            if out is None or lse is None:
                out, lse = part, part_lse
            elif left or q.dtype == exact:
                merge_(out, lse, part, part_lse)
            else:
                rounded = torch.empty_like(out, dtype=q.dtype)
                merge_(out, lse, part, part_lse, rounded)
                out = rounded
        if out is None or lse is None:
            out = q.new_zeros((*q.shape[:3], v.shape[-1]))
            lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=exact)
        ctx.save_for_backward(q, k, v, out, lse, *received)
        ctx.stages, ctx.group, ctx.refetch, ctx.options = stages, group, refetch, options
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *received = ctx.saved_tensors
        stages: tuple[Stage, ...] = ctx.stages
        exact = torch.promote_types(q.dtype, torch.float32)
        dout = torch.zeros_like(out) if dout is None else dout
        delta = attention_delta(out, dout, dlse, backend=ctx.options["backend"])
        dq: Tensor | None = None

        def gradients(stage: Stage, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            """dk and dv of a stage; its part of dq is added."""
            nonlocal dq
            if not stage.area:
                return torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
            options = dict(ctx.options, grad_dtype=exact, deterministic=ctx.deterministic)
            dq_s, dk, dv = attention_backward(dout, q, k, v, lse, delta, stage.mask, **options)
            dq = dq_s if dq is None else dq.add_(dq_s)
            return dk, dv

        # The last stage first, which may be the largest, and the rank's own keys last: the gradients travel meanwhile.
        remote = stages[:0:-1]
        # Without refetching there are as many as stages; with it there are none.
        arrivals: Iterable[tuple[Stage, Tensor]] = zip(remote, reversed(received), strict=not ctx.refetch)
        if ctx.refetch:
            arrivals = _arrivals(remote, k, v, ctx.group, ahead=1)
        returning: list[Pending] = []
        for stage, keys in arrivals:
            dk_s, dv_s = gradients(stage, *unpack(keys, k.shape[-1]))
            returning.append(start_gradients(stage, dk_s, dv_s, _some(ctx.group)))
        total = pack(*gradients(stages[0], k, v))
        for stage, pending in zip(remote, returning, strict=True):
            add_gradients_(total, stage, pending.wait())
        dk, dv = unpack(total, k.shape[-1])
        dq = torch.zeros_like(q) if dq is None else dq
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _arrivals(
    stages: Sequence[Stage], k: Tensor, v: Tensor, group: dist.ProcessGroup | None, *, ahead: int
) -> Iterator[tuple[Stage, Tensor]]:
    """Each stage with its packed keys. The first `ahead` exchanges start here, one more whenever one has arrived."""
    own = pack(k, v) if stages else k
    travelling = deque(start_keys(stage, own, _some(group)) for stage in stages[:ahead])

    def arrive() -> Iterator[tuple[Stage, Tensor]]:
        for s, stage in enumerate(stages):
            keys = travelling.popleft().wait()
            if s + ahead < len(stages):
                travelling.append(start_keys(stages[s + ahead], own, _some(group)))
            yield stage, keys

    return arrive()


def _words(x: Tensor) -> str:
    """What of a tensor must be the same on all ranks: all but its rows."""
    return f"{str(x.dtype).removeprefix('torch.')} {[n if i != 1 else 'T' for i, n in enumerate(x.shape)]}"


def _some(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A plan for more than one rank never meets a context without a group."""
    assert group is not None
    return group
