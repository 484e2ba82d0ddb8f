"""The losses of a micro-batch, one class a task; `fm_longctx.train.step.Task` says what an engine asks of them.

The rule of averaging: a rank gives its *share* of the step's sum of losses and of what that sum is divided by, so that
shares add up over data and context ranks and micro-batches, each label or pair once. A label lies on one context rank
and is its share already. Answers lie across them: their log-probabilities and scores are summed over the context ranks
(`sum_over_ranks`), all of these compute the loss of each pair, and count it 1 / ranks each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx.context_parallel.sums import sum_over_ranks
from fm_longctx.data import Batch
from fm_longctx.train.config.task import TaskConfig
from fm_longctx.train.tasks import losses
from fm_longctx.train.tasks.log_probs import sequence_log_probs
from fm_longctx.train.tasks.stream import READ_AT


class Pairs:
    """What tasks over pairs of answers share: what is counted, and figures beside the loss."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self._figures: dict[str, Tensor] = {}
        self._pairs = 0

    @property
    def counts(self) -> bool:
        """Whether this rank's micro-batches are counted: the first of those that share them does."""
        return self.group is None or dist.get_rank(self.group) == 0

    def count(self, batch: Batch) -> int:
        """This rank's share of the pairs: all of the batch's, or none."""
        return sum(len(answers.pairs) for answers in batch.about) if self.counts else 0

    def note(self, pairs: int, **figures: Tensor) -> None:
        """Keep `[pairs]` figures of a micro-batch for `take_figures`."""
        self._pairs += pairs * self.counts
        for name, values in figures.items():
            total = values.detach().double().sum() * self.counts
            self._figures[name] = self._figures[name] + total if name in self._figures else total

    def take_figures(self) -> dict[str, float]:
        """Means over the pairs of all ranks since the last call. A collective."""
        names = sorted(self._figures)
        sums = torch.stack([self._figures[name] for name in names])
        sums = torch.cat([sums, sums.new_tensor([self._pairs])])
        dist.all_reduce(sums)
        self._figures, self._pairs = {}, 0
        *totals, pairs = sums.tolist()
        return {name: total / pairs for name, total in zip(names, totals, strict=True)}


class Preference(Pairs):
    """DPO: the chosen answer's log-probability over the reference's should exceed the rejected one's.

    Args:
        config: beta, loss, label_smoothing.
        group: the ranks that share a sequence.
        reference: gives, for the policy's model, a context whose value is the reference: a frozen copy, or the same
            model without its adapters. None: the records hold the reference's log-probabilities.
        chunk: rows whose logits exist at once.
    """

    def __init__(
        self,
        config: TaskConfig,
        group: dist.ProcessGroup | None,
        *,
        reference: Callable[[Any], AbstractContextManager[Any]] | None = None,
        chunk: int = 1024,
    ) -> None:
        super().__init__(group)
        self.config, self.reference, self.chunk = config, reference, chunk

    def loss(self, model: Any, batch: Batch, mask: dict[str, Any]) -> Tensor:
        read_at, pairs, _, references = together(batch)

        def log_probs(of: Callable[..., Tensor]) -> Tensor:
            def read(causal_lm: Any, hidden: Tensor) -> Tensor:
                weight = causal_lm.get_output_embeddings().weight
                return sequence_log_probs(hidden, weight, batch.labels, read_at, count_answers(batch), chunk=self.chunk)

            part = of(batch.tokens, batch.labels, batch.positions, read=read, **mask)
            return sum_over_ranks(part, self.group)

        # The reference first: its forward must not come between the policy's and its backward.
        if self.reference is not None:
            with torch.no_grad(), self.reference(model) as frozen:
                references = log_probs(frozen)
        gain = log_probs(model) - references
        chosen, rejected = gain[pairs].unbind(1)
        config = self.config
        each = losses.dpo(chosen - rejected, beta=config.beta, label_smoothing=config.label_smoothing, kind=config.loss)
        self.note(
            len(pairs),
            dpo_accuracy=(chosen > rejected).float(),
            dpo_margin=config.beta * (chosen - rejected),
            dpo_chosen_reward=config.beta * chosen,
            dpo_rejected_reward=config.beta * rejected,
        )
        return each.sum() / self.size


class Reward(Pairs):
    """A reward model: of each pair of answers the better one should have the higher score at its last token.

    Args:
        config: center_rewards_coefficient.
        group: the ranks that share a sequence.
    """

    def __init__(self, config: TaskConfig, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self.config = config

    def loss(self, model: Any, batch: Batch, mask: dict[str, Any]) -> Tensor:
        read_at, pairs, margins, _ = together(batch)

        def read(classifier: Any, hidden: Tensor) -> Tensor:
            rows = (read_at >= 0).flatten().nonzero()[:, 0]
            wide = torch.promote_types(hidden.dtype, torch.float32)
            # [answers here, C] x [C, 1]
            scores = (hidden.flatten(0, -2)[rows].to(wide) @ classifier.score.weight.to(wide).t())[:, 0]
            # Each answer's last token lies on one rank; the others add 0.
            return scores.new_zeros(count_answers(batch)).index_add(0, read_at.flatten()[rows], scores)

        part = model(batch.tokens, batch.labels, batch.positions, read=read, **mask)
        scores = sum_over_ranks(part, self.group)
        better, worse = scores[pairs].unbind(1)
        each = losses.bradley_terry(better, worse, margin=margins, center=self.config.center_rewards_coefficient)
        self.note(
            len(pairs),
            reward_accuracy=(better > worse).float(),
            reward_margin=better - worse,
            reward_better=better,
            reward_worse=worse,
        )
        return each.sum() / self.size


def count_answers(batch: Batch) -> int:
    """Of all the batch's sequences."""
    return sum(answers.count for answers in batch.about)


def together(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The answers of a batch's sequences numbered through, on the batch's device.

    Returns:
        read_at: int64 `[B, T]`, as in the stream. pairs: int64 `[pairs, 2]`. margins: `[pairs]`. references:
        `[answers]`, or `[0]`.
    """
    device = batch.tokens.device
    counts = torch.tensor([answers.count for answers in batch.about])
    first = counts.cumsum(0) - counts
    local = batch.extra[READ_AT]
    read_at = torch.where(local >= 0, local + first.to(device)[:, None], -1)
    pairs = torch.cat([answers.pairs + start for answers, start in zip(batch.about, first, strict=True)])
    margins = torch.cat([answers.margins for answers in batch.about])
    references = torch.cat([answers.references for answers in batch.about])
    return read_at, pairs.to(device), margins.to(device), references.to(device)


def figures_of(task: object) -> Mapping[str, float]:
    """What the task has to say of a step beside its loss, by name. A collective, where it has anything."""
    return task.take_figures() if isinstance(task, Pairs) else {}
