"""The mask in a batch of Megatron's own: its documents (thd), its dense attention mask, or plain causality.

All under Megatron's own zigzag sharding, so that positions, labels and loss masks stay where they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fm_longctx import ContextParallel, FlashMask, ShardPlan
from fm_longctx.integrations.megatron.window import Window, window_mask
from fm_longctx.integrations.megatron.zigzag import zigzag_owners
from fm_longctx.mask import builders

_CACHE = "_fm_longctx_contexts"


def thd_context(
    params: PackedSeqParams,
    tokens: int,
    *,
    causal: bool,
    window: Window | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> ContextParallel:
    """Of a thd batch: documents from its cu_seqlens, each sharded zigzag. Made once per batch and kept on `params`.

    Args:
        tokens: T, this rank's.
        causal: within a document.

    Padding between documents (`cu_seqlens_q_padded`) becomes documents of its own, seen by no real token.
    """
    cached = params.__dict__.setdefault(_CACHE, {})
    key = (tokens, causal, window, device)
    if key not in cached:
        world_size = 1 if group is None else dist.get_world_size(group)
        bounds, padded = _document_bounds(params, tokens * world_size)
        owners = zigzag_owners(padded, world_size)
        mask = _within(FlashMask.from_cu_seqlens(bounds, causal=causal), window)
        cached[key] = ContextParallel(group, ShardPlan.from_owners(mask, owners, world_size), mask, device=device)
    context: ContextParallel = cached[key]
    return context


# By a weak reference to a mask's memory, which no other tensor can have while it lives: its version and contexts.
_of_dense: dict[StorageWeakRef, tuple[int, dict[Any, ContextParallel]]] = {}


def dense_context(
    attention_mask: Tensor,
    batch: int,
    tokens: int,
    *,
    window: Window | None,
    group: dist.ProcessGroup | None,
) -> ContextParallel:
    """Of a dense mask, bool `[1 or B, 1, T, N]`, True = masked: this rank's rows, cut by `get_batch_on_this_cp_rank`.

    The ranks gather all rows and find the intervals, N x N memory, once per mask; later layers, recomputation included,
    reuse the result.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    n = tokens * world_size
    if attention_mask.dtype != torch.bool or attention_mask.shape not in ((1, 1, tokens, n), (batch, 1, tokens, n)):
        raise ValueError(
            f"attention_mask must be bool [1 or {batch}, 1, {tokens}, {n}] (this rank's rows, all columns; True = "
            f"masked), got {attention_mask.dtype} {list(attention_mask.shape)}. Pass FlashMaskParams for other masks."
        )
    for memory in [memory for memory in _of_dense if memory.expired()]:
        del _of_dense[memory]
    memory = StorageWeakRef(attention_mask.untyped_storage())
    version, contexts = _of_dense.get(memory, (attention_mask._version, {}))
    if version != attention_mask._version:
        contexts = {}
    key = (attention_mask.storage_offset(), attention_mask.shape, attention_mask.stride(), window, group)
    if key not in contexts:
        owners = zigzag_owners(torch.tensor([0, n]), world_size)
        mask = FlashMask.from_dense(~_gather_rows(attention_mask, owners, group))
        mask = _within(mask.to("cpu"), window)
        plan = ShardPlan.from_owners(mask, owners, world_size)
        contexts[key] = ContextParallel(group, plan, mask, device=attention_mask.device)
    _of_dense[memory] = (attention_mask._version, contexts)
    return contexts[key]


@lru_cache(maxsize=8)
def causal_context(
    tokens: int, *, window: Window | None, group: dist.ProcessGroup | None, device: torch.device
) -> ContextParallel:
    """Plain causal attention over the whole sequence, sharded zigzag."""
    world_size = 1 if group is None else dist.get_world_size(group)
    mask = _within(builders.causal(tokens * world_size), window)
    owners = zigzag_owners(torch.tensor([0, tokens * world_size]), world_size)
    return ContextParallel(group, ShardPlan.from_owners(mask, owners, world_size), mask, device=device)


def _document_bounds(params: PackedSeqParams, n: int) -> tuple[Tensor, Tensor]:
    """Bounds of documents and of the padding between them, and of documents with their padding; both 0 to N."""
    for name in ("cu_seqlens_q", "cu_seqlens_q_padded"):
        other = getattr(params, name.replace("_q", "_kv"))
        mine = getattr(params, name)
        if mine is not other and (mine is None or other is None or not torch.equal(mine, other)):
            raise ValueError(f"{name} and {name.replace('_q', '_kv')} differ: self-attention has one set of documents.")
    if params.cu_seqlens_q is None:
        raise ValueError("a thd batch must bring cu_seqlens_q, the bounds of its documents; got None.")
    real = _one_row(params.cu_seqlens_q)
    padded = real if params.cu_seqlens_q_padded is None else _one_row(params.cu_seqlens_q_padded)
    if real.ndim != 1 or padded.shape != real.shape or int(padded[-1]) != n:
        raise ValueError(
            f"this thd batch has {n} tokens over all context-parallel ranks, so its bounds must be [documents + 1] and "
            f"end there, got {list(padded.shape)} ending at {int(padded.flatten()[-1])}. Make padding at the end a "
            "document."
        )
    ends = padded[:-1] + real.diff()
    if bool((ends > padded[1:]).any()):
        raise ValueError("a document of cu_seqlens_q is longer than cu_seqlens_q_padded leaves room for.")
    bounds = torch.stack([padded[:-1], ends], dim=1).flatten()
    return torch.cat([bounds, padded[-1:]]), padded


def _one_row(bounds: Tensor) -> Tensor:
    """Megatron's pretrain_gpt.py hands the bounds on as its loader made them, [1, documents + 1]."""
    bounds = bounds.cpu().long()
    return bounds[0] if bounds.ndim == 2 and len(bounds) == 1 else bounds


def _gather_rows(attention_mask: Tensor, owners: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Bool `[B, 1, N, N]` from every rank's rows."""
    if group is None:
        return attention_mask
    mine = attention_mask.contiguous().view(torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    order = owners.argsort(stable=True).argsort()
    return torch.cat(parts, dim=2).index_select(2, order.to(mine.device)).view(torch.bool)


def _within(mask: FlashMask, window: Window | None) -> FlashMask:
    return mask if window is None else mask & window_mask(mask.num_rows, window)
