"""One optimizer step: its loss, what it is averaged over, and what it found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx import ContextParallel
from fm_longctx.data import IGNORED, Batch

if TYPE_CHECKING:
    from fm_longctx.train.engines import Engine, World


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
    """Over all ranks and micro-batches; pairs of answers for tasks that compare them."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the task says beside its loss, by name; means over the same labels or pairs."""
    fault: str | None = None
    """Why the step was not taken; None if it was."""


class Task(Protocol):
    """What the model is trained to do: the loss of a micro-batch, as a sum and what it is to be divided by.

    Over the data and context ranks and the micro-batches of a step both are added up, and the step's loss is the
    quotient; so a rank gives its own share of each, and ranks may have unequal shares.
    """

    def count(self, batch: Batch) -> int:
        """This rank's share of what the loss is a mean over: its labels, or its pairs. Known before the forward."""

    def loss(self, model: Any, batch: Batch, mask: dict[str, Any]) -> Tensor:
        """This rank's share of the sum of losses, a scalar with a gradient.

        Args:
            model: called as `LanguageModel` is, `model(tokens, labels, positions, **mask)`; sharded or wrapped.
            batch: on the device.
            mask: `mask_keyword`'s: `flashmask=`, or `context=` with the group of ranks that share the sequences.
        """


class NextToken:
    """Every label is predicted from the tokens before it; pretraining, and fine-tuning on chosen labels."""

    def count(self, batch: Batch) -> int:
        return int((batch.labels != IGNORED).sum())

    def loss(self, model: Any, batch: Batch, mask: dict[str, Any]) -> Tensor:
        total: Tensor = model(batch.tokens, batch.labels, batch.positions, **mask)
        return total


def refuse_other_tasks(task: Task, what: str, remedy: str) -> None:
    """Raise a ValueError for a task that reads the model in a way of its own, where only next tokens were seen to work.

    Args:
        what, remedy: which option is in the way, and what to set instead.
    """
    if not isinstance(task, NextToken):
        raise ValueError(
            f"{what} predicts next tokens, and cannot train the task {type(task).__name__}. Set {remedy}, or "
            "task.kind to pretrain or sft."
        )


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Why a step must not be taken: its loss or its gradient is not finite. None if both are."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return None


def train_step(
    engine: Engine, batches: Sequence[Batch], judge: Callable[[float, float], str | None] = not_finite
) -> StepResult:
    """One optimizer step over this rank's micro-batches, taken by every rank or by none.

    Args:
        judge: called with loss and gradient norm before the optimizer moves; what it says against the step, on any
            rank, is the result's `fault`, and then weights and optimizer stay as they were.
    """
    result = engine.gradients(batches)
    fault = judge(result.loss, result.grad_norm)
    bad = torch.tensor([fault is not None], dtype=torch.int32, device=engine.world.device)
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    if not int(bad):
        engine.update()
        return result
    engine.discard()
    return replace(result, fault=fault or "another rank found a fault")


def count_labels(task: Task, batches: Sequence[Batch], world: World) -> int:
    """What the step's loss is a mean over, added up over all data and context ranks. A collective.

    Raises:
        TrainingError: it is 0.
    """
    count = torch.tensor([sum(task.count(batch) for batch in batches)], device=world.device)
    dist.all_reduce(count)
    if not int(count):
        raise TrainingError("no token of this step has anything to predict: all its documents have one token.")
    return int(count) // world.copies


def mean_loss(total: Tensor, labels: int, world: World) -> float:
    """The step's loss from this rank's sum, float64; it is overwritten. A collective."""
    dist.all_reduce(total)
    return float(total) / (labels * world.copies)


def check_mask_heads(batch: Batch, world: World) -> None:
    """Raise a ValueError for a mask of several heads where tensor ranks have heads of their own."""
    if world.tp_size > 1 and batch.mask.heads > 1:
        raise ValueError(
            f"parallel.tensor={world.tp_size} gives each rank some of the heads, and this batch's mask has "
            f"{batch.mask.heads} heads. Set parallel.tensor to 1 for such masks."
        )


def mask_keyword(batch: Batch, world: World) -> dict[str, Any]:
    """How the batch's mask is handed to the model: itself, or under a context where sequences are sharded."""
    check_mask_heads(batch, world)
    if world.cp_size == 1:
        return {"flashmask": batch.mask}
    return {"context": ContextParallel(world.cp_group, batch.local, device=world.device)}
