"""Joining attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part into `out` and `lse`, in place.

    Args:
        out, part: `[B, N, H, D_v]`, float32 or float64: each the softmax average over its own keys.
        lse, part_lse: `[B, H, N]`, natural log-sum-exp over the same keys; -inf, with an average of 0, where a row sees
            none of them.

    A row that sees no key in either stays 0 and -inf: the weights are then taken as 0, because -inf - (-inf) is NaN.
    """
    total = torch.logaddexp(lse, part_lse)
    reference = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_(_per_row(torch.exp(lse - reference))).addcmul_(part, _per_row(torch.exp(part_lse - reference)))
    lse.copy_(total)


def _per_row(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).unsqueeze(-1)
