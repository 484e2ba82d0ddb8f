"""A number for each packed sequence (log-probability, score) and losses over pairs, exact also over several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fm_longctx.context_parallel.sums import sum_over_ranks
from fm_longctx.data import IGNORED
from fm_longctx.integrations.transformers.collator import PlannedContext

if TYPE_CHECKING:
    import torch.distributed as dist


def sequence_log_probs(logits: Tensor, batch: Mapping[str, Any], num_sequences: int | None = None) -> Tensor:
    """Log-probability of each sequence of a batch, float32 `[sequences]`, in the order of the features.

    A document is one sequence, a pair is two (chosen, rejected), completions are one each, a tree has one a segment.

    Of a batch whose ranks share its sequences, and whose context is joined, every rank gets the whole sums. The
    gradients are those of a loss that all ranks compute alike and a trainer averages over ranks, as DDP, FSDP and
    DeepSpeed do. Where the context is only planned, the result is the rank's part, and their sum is the whole.

    Args:
        logits: `[1, T, vocabulary]`.
        batch: from a `DataCollatorForFlashMask(return_sequence_ids=True)`.
        num_sequences: of the batch, on whatever rank; found if not given, which a planned context does not allow.
    """
    ids, number, group = _sequences(batch, logits.device, num_sequences)
    if "shift_labels" in batch:
        labels = batch["shift_labels"].to(logits.device)
    else:
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).to(logits.device)
    counted = (labels != IGNORED) & (ids >= 0)
    chosen = -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    total = torch.zeros(number, dtype=torch.float32, device=logits.device)
    return sum_over_ranks(total.index_add(0, ids[counted], chosen.view_as(labels)[counted]), group)


def sequence_values(values: Tensor, batch: Mapping[str, Any], num_sequences: int | None = None) -> Tensor:
    """What the last token of each sequence says, such as a reward model's score: float32 `[sequences]`.

    Order, ranks and gradients as of `sequence_log_probs`.

    Args:
        values: `[1, T]` or `[1, T, 1]`, such as the logits of a token classification model with one label.
        batch, num_sequences: as there; its context must be joined.

    Raises:
        ValueError: a context that is not joined, an empty sequence, or one that others of the batch continue (within a
            tree), whose last token is a row of theirs.
    """
    ids, number, group = _sequences(batch, values.device, num_sequences)
    if isinstance(batch.get("context"), PlannedContext):
        raise ValueError(
            "the context of this batch is only planned, and which token is a sequence's last is not known on one rank. "
            'Give the batch that the model was called with: batch["context"].join(group).'
        )
    values = values.float().view(ids.shape)
    place = batch["position_ids"].to(values.device)
    owned = ids >= 0
    last = torch.full((number,), -1, device=values.device)
    last = _largest(last.scatter_reduce(0, ids[owned], place[owned], "amax"), group)
    is_last = owned & (place == last[ids.clamp(min=0)])
    labels = batch["shift_labels"] if "shift_labels" in batch else F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    goes_on = torch.zeros(number, dtype=torch.int64, device=values.device)
    goes_on = goes_on.index_add(0, ids[is_last], (labels.to(values.device)[is_last] != IGNORED).long())
    wrong = (last < 0) | (_largest(goes_on, group) > 0)
    if bool(wrong.any()):
        raise ValueError(
            f"sequences {wrong.nonzero()[:, 0].tolist()} of this batch have no last token of their own: they are "
            "empty, or segments of a tree that others continue. Give them as documents, pairs or completions."
        )
    total = torch.zeros(number, dtype=torch.float32, device=values.device)
    return sum_over_ranks(total.index_add(0, ids[is_last], values[is_last]), group)


def dpo_loss(log_probs: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    """The mean DPO loss (arXiv 2305.18290) of a batch of preference pairs, from `sequence_log_probs` of two models.

    Args:
        log_probs, reference: `[2 x pairs]`, chosen and rejected by turns; of the model and of the frozen one.
    """
    chosen, rejected = _pairs(log_probs - reference)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def reward_loss(scores: Tensor) -> Tensor:
    """The mean Bradley-Terry loss of a batch of pairs, from `sequence_values`: `[2 x pairs]`, chosen and rejected by
    turns."""
    chosen, rejected = _pairs(scores)
    return -F.logsigmoid(chosen - rejected).mean()


def _pairs(of_sequences: Tensor) -> tuple[Tensor, Tensor]:
    if of_sequences.ndim != 1 or of_sequences.numel() % 2:
        raise ValueError(
            f"a loss over pairs needs [2 x pairs], chosen and rejected by turns, got {list(of_sequences.shape)}: every "
            "feature of the batch must be a pair."
        )
    chosen, rejected = of_sequences.view(-1, 2).unbind(1)
    return chosen, rejected


def _sequences(
    batch: Mapping[str, Any], device: torch.device, num_sequences: int | None
) -> tuple[Tensor, int, dist.ProcessGroup | None]:
    """Which sequence each of the rank's rows belongs to `[1, T]`, their number, and the ranks that share them."""
    if "sequence_ids" not in batch:
        raise ValueError(
            "the batch has no sequence_ids. Make it with DataCollatorForFlashMask(return_sequence_ids=True)."
        )
    ids: Tensor = batch["sequence_ids"].to(device)
    context = batch.get("context")
    if isinstance(context, PlannedContext):
        if num_sequences is None:
            raise ValueError("a sharded batch does not show how many sequences there are: pass num_sequences=.")
        return ids, num_sequences, None
    group = None
    if context is not None:
        group = (next(iter(context.values())) if isinstance(context, Mapping) else context).group
    if num_sequences is None:
        # A rank may have no row at all.
        number = F.pad(ids.flatten(), (1, 0), value=-1).max() + 1
        num_sequences = int(_largest(number, group))
    return ids, num_sequences, group


def _largest(of_rank: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        import torch.distributed as dist

        dist.all_reduce(of_rank, op=dist.ReduceOp.MAX, group=group)
    return of_rank
