"""Log-probabilities of sequences under a large vocabulary, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fm_longctx.data import IGNORED
from fm_longctx.train.loss import _product as product


def sequence_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, sequence_ids: Tensor, num_sequences: int, *, chunk: int = 1024
) -> Tensor:
    """Sum of the log-probabilities of each sequence's labels, in nats; of the rows given, so of a rank's part of them.

    Only rows with a label cost anything. Logits exist for `chunk` rows at a time, and once more in the backward: how
    much a row counts is known only when all its sequence has been summed.

    Precision: as `chunked_cross_entropy`; sums are float32 (float64 for float64 input).

    Args:
        hidden: `[..., C]`.
        weight: `[V, C]`, the output projection, of hidden's dtype.
        labels: int64 `[...]`, shifted already; -100 where nothing is predicted.
        sequence_ids: int64 `[...]`: the sequence that a row's label belongs to; read where there is a label.
        num_sequences: A, the sequences of the batch, on whatever rank.
        chunk: rows at a time.

    Returns:
        `[A]`; 0 for a sequence that has no label here.
    """
    rows = (labels != IGNORED).flatten().nonzero()[:, 0]
    each: Tensor = _LogProbs.apply(hidden.flatten(0, -2)[rows], weight, labels.flatten()[rows], chunk)
    return each.new_zeros(num_sequences).index_add(0, sequence_ids.flatten()[rows], each)


class _LogProbs(torch.autograd.Function):
    """Of each row's label: hidden `[T, C]`, weight `[V, C]`, labels `[T]` to `[T]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        chosen = torch.empty_like(lse)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = product(hidden[part], weight.t())  # [chunk, V]
            lse[part] = logits.logsumexp(-1)
            chosen[part] = logits.gather(-1, labels[part, None])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.chunk = chunk
        return chosen - lse

    @staticmethod
    def backward(ctx: Any, d_each: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            # d log p / d logits = onehot(label) - softmax, times what the row counts.
            d_logits = product(hidden[part], weight.t()).sub_(lse[part, None]).exp_().neg_()
            index = labels[part, None]
            d_logits.scatter_add_(-1, index, torch.ones_like(index, dtype=lse.dtype))
            d_logits = d_logits.mul_(d_each[part, None]).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += product(d_logits.t(), hidden[part])
        return d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), None, None
