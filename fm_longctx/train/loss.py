"""Cross-entropy of hidden states against a large vocabulary, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fm_longctx.data import IGNORED


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """Sum of the token losses `logsumexp(h @ W^T) - (h @ W^T)[label]`, in nats.

    Logits exist for `chunk` tokens at a time. The gradients are computed beside the loss, in the forward pass, so
    the logits are never computed twice (4 products become 3); the backward only scales them.

    Precision: the loss, the softmax and the sum over chunks of the weight's gradient are float32 (float64 for float64
    input) whatever the inputs are; products of bf16 inputs are accumulated and kept in float32. Each gradient is
    rounded once to its input's dtype; d loss / d logits is rounded to it too, as the operand of two products.

    Memory, for T tokens, hidden size C and vocabulary V: while it runs, two `[chunk, V]` and one more `[V, C]` float32;
    from the forward to the backward `[T, C]` in hidden's dtype and `[V, C]` float32. At V = 128256, C = 2048,
    chunk = 1024, T = 131072 and bf16 that is 2.1 GB and 1.6 GB; the full logits alone would take 67 GB.

    Args:
        hidden: `[..., C]`.
        weight: `[V, C]`, the output projection, of hidden's dtype. As a DTensor, its rows are split over tensor ranks,
            which all hold the same hidden and labels: a collective, and each returns the whole sum.
        labels: int64, hidden's shape without C; -100 where nothing is predicted.
        chunk: tokens at a time, at least 1.

    Returns:
        scalar, float32 (float64 for float64 input): the sum, not the mean, so that ranks and micro-batches with uneven
        label counts can be weighted rightly by the caller. 0 if there is no label.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if labels.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden [..., C], weight [V, C] and labels [...] do not fit together: got {list(hidden.shape)}, "
            f"{list(weight.shape)} and {list(labels.shape)}."
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}.")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    group, first = None, 0
    if isinstance(weight, DTensor):
        group, first, weight = _own_rows(weight)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), chunk, group, first)
    return loss


def _own_rows(weight: DTensor) -> tuple[dist.ProcessGroup, int, Tensor]:
    """The tensor ranks, the first row of this one and its rows, equally many on each."""
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(
            f"a weight that is a DTensor must be split by rows over one mesh axis, got {weight.placements}."
        )
    local: Tensor = weight.to_local()
    return weight.device_mesh.get_group(), weight.device_mesh.get_local_rank() * local.shape[0], local


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        group: dist.ProcessGroup | None,
        first: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part], labels[part]
            counted = target != IGNORED
            # Whose logit this rank has: all of them, unless the vocabulary is split.
            mine = counted & (target >= first) & (target < first + weight.shape[0])
            index = torch.where(mine, target - first, 0)[:, None]
            logits = _product(h, weight.t())  # [chunk, V]
            # Few passes over the chunk's logits: they are bound by memory, beside products that are not.
            if group is None:
                logits = logits.log_softmax(-1)
                of_label = logits.gather(-1, index)[:, 0]
            else:
                lse = logits.logsumexp(-1)
                own = torch.where(mine, logits.gather(-1, index)[:, 0], 0)
                lse, of_label = _joined(lse, own, group)
                logits.sub_(lse[:, None])
                of_label = of_label - lse
            total -= torch.where(counted, of_label, 0).sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax - onehot(label), written over the logits; 0 where nothing is predicted.
            logits.exp_().scatter_add_(-1, index, -mine[:, None].to(wide))
            d_logits = torch.empty_like(logits, dtype=hidden.dtype)
            torch.mul(logits, counted[:, None], out=d_logits)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits.t(), h)
            # Or they would still be there while the next chunk's are made.
            del logits, d_logits
        if group is not None and d_hidden is not None:
            dist.all_reduce(d_hidden, group=group)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * d_total).to(ctx.dtypes[0])
        if d_weight is not None:
            d_weight = (d_weight * d_total).to(ctx.dtypes[1])
        return d_hidden, d_weight, None, None, None, None


def _joined(lse: Tensor, of_label: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over the whole vocabulary, from each tensor rank's own part, `[chunk]` each."""
    own = torch.stack([lse, of_label])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    everyone = torch.stack(parts)
    return everyone[:, 0].logsumexp(0), everyone[:, 1].sum(0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 at least; in place, since it is as large as the vocabulary."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 at least: low-precision operands, wide result."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
