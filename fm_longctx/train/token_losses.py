"""The loss of each token, for evaluation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fm_longctx.data import IGNORED, Batch
from fm_longctx.train.loss import _product
from fm_longctx.train.step import mask_keyword

if TYPE_CHECKING:
    from fm_longctx.train.engines import World


@torch.no_grad()
def evaluate_batch(model: Any, batch: Batch, world: World, *, chunk: int) -> Tensor:
    """`Engine.token_losses` of an engine whose model is called as `LanguageModel` is, sharded or wrapped."""
    here = batch.to(world.device)
    model.eval()
    try:
        read = partial(token_losses, labels=here.labels, chunk=chunk)
        losses: Tensor = model(here.tokens, here.labels, here.positions, read=read, **mask_keyword(here, world))
    finally:
        model.train()
    return losses


@torch.no_grad()
def token_losses(causal_lm: Any, hidden: Tensor, *, labels: Tensor, chunk: int) -> Tensor:
    """Of a Hugging Face model and its hidden states `[B, T, C]` the loss of each label, float32 `[B, T]`, in nats.

    0 where nothing is predicted. Logits exist for `chunk` tokens at a time, in float32; no gradient.
    """
    weight = causal_lm.get_output_embeddings().weight
    if isinstance(weight, DTensor):
        # Split over tensor ranks, which all hold these tokens: a forward alone can afford the whole.
        weight = weight.full_tensor()
    flat, target = hidden.flatten(0, -2), labels.flatten()
    counted = target != IGNORED
    index = torch.where(counted, target, 0)[:, None]
    losses = torch.zeros(target.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(target), chunk):
        part = slice(start, start + chunk)
        logits = _product(flat[part], weight.t()).float()
        losses[part] = torch.where(counted[part], logits.logsumexp(-1) - logits.gather(-1, index[part])[:, 0], 0)
    return losses.view(labels.shape)
