"""One optimizer step over a rank's micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fm_longctx import ContextParallel
from fm_longctx.data import IGNORED, Batch
from fm_longctx.train.engine import World
from fm_longctx.train.model import LanguageModel


class TrainingError(RuntimeError):
    """Training cannot go on, on any rank; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step knows afterwards, the same on every rank."""

    loss: float
    """Mean over the step's labels."""
    grad_norm: float
    """Before clipping."""
    labels: int
    """Over all ranks and micro-batches."""


def train_step(
    model: LanguageModel, optimizer: Optimizer, batches: Sequence[Batch], world: World, *, clip_norm: float | None
) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    Every label of the step weighs the same, whatever rank and micro-batch it is in: the labels are counted
    over all of them before the first backward, each local sum is divided by that count, and multiplied by the number of
    ranks because the engine averages gradients over them.

    Raises:
        TrainingError: the gradient is not finite; on every rank, before the optimizer has moved.
    """
    count = torch.tensor([sum(int((b.labels != IGNORED).sum()) for b in batches)], device=world.device)
    dist.all_reduce(count)
    labels = int(count)
    if labels == 0:
        raise TrainingError("no token of this step has anything to predict: all its documents have one token.")

    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in batches:
        here = batch.to(world.device)
        loss_sum = model(here.tokens, here.labels, here.positions, **mask_keyword(here, world))
        (loss_sum * (world.size / labels)).backward()
        total += loss_sum.detach()
    dist.all_reduce(total)

    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip_norm is None else clip_norm)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(grad_norm):
        raise TrainingError(
            f"the gradient norm is {grad_norm} (loss {float(total) / labels:.4f}); the weights are the "
            "previous step's. Lower optimizer.lr, lengthen schedule.warmup_steps, or resume from the last checkpoint."
        )
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss=float(total) / labels, grad_norm=grad_norm, labels=labels)


def mask_keyword(batch: Batch, world: World) -> dict[str, Any]:
    """How the batch's mask is handed to the model: itself, or under a context where sequences are sharded."""
    if world.cp_size == 1:
        return {"flashmask": batch.mask}
    return {"context": ContextParallel(world.cp_group, batch.local, device=world.device)}
