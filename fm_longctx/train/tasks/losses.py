"""Losses over pairs of answers, a number for each pair; as TRL defines them.

TRL (trl 1.16.0) computes them inside its trainers, where they cannot be called alone: `DPOTrainer._compute_loss`
(`loss_type="sigmoid"` and `"robust"`) and `RewardTrainer.compute_loss`. The smoothed sigmoid is that of TRL before 1.0
(Mitchell, a note on DPO with noisy preferences); "robust" is that of arXiv 2403.00409.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo(margin: Tensor, *, beta: float, label_smoothing: float = 0.0, kind: str = "sigmoid") -> Tensor:
    """DPO (arXiv 2305.18290) of each pair.

    Args:
        margin: `[pairs]`: (log-probability of the chosen answer over its reference's) - (the same of the rejected one).
        beta: as in the paper.
        label_smoothing: the probability that a pair's answers were swapped, in [0, 0.5).
        kind: "sigmoid": the expected loss under it; "robust": the loss whose expectation under it is the unswapped one.
    """
    right, swapped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    if kind == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * swapped) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * swapped


def bradley_terry(better: Tensor, worse: Tensor, *, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    """The negative log-probability that the better answer wins, by their scores, of each pair.

    Args:
        better, worse: `[pairs]`, scores.
        margin: by which the better one's score should lead, `[pairs]` or one number.
        center: weight of the squared sum of the two scores.
    """
    loss = -F.logsigmoid(better - worse - margin)
    return loss + center * (better + worse) ** 2 if center else loss
