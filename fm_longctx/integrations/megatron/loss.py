"""The loss function that Megatron's schedules want: sums and counts, averaged over tokens once a step."""

from __future__ import annotations

import torch
from torch import Tensor


def per_token_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a forward step hands to the schedule: `return output, partial(per_token_loss, loss_mask)`.

    With `calculate_per_token_loss=True` Megatron adds the gradients of every micro-batch, data-parallel and
    context-parallel rank and divides once, by the step's labels. Without it each rank and micro-batch is averaged first
    and weighs equally, which is wrong where they have unequal label counts, as packed documents do.

    Args:
        loss_mask: `[b, T]`, 1 where there is a label, sharded like the tokens.
        losses: `[b, T]`, what the model returns when it is given labels.

    Returns:
        the local sum (float32), the local number of labels (int32), and `{"lm loss": [sum, labels]}`, which Megatron's
        logging adds over ranks and micro-batches before it divides.
    """
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(losses.reshape(-1).float() * mask)
    labels = mask.sum().detach().to(torch.int)
    return total, labels, {"lm loss": torch.stack([total.detach(), labels.float()])}
