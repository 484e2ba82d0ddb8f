"""Joining attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_longctx.kernels.merge import merge


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, result: Tensor | None = None) -> None:
    """Merge a part into `out` and `lse`, in place: one pass that reads both outputs and writes one.

    Args:
        out, part: `[B, N, H, D_v]`, float32 or float64: each the softmax average over its own keys.
        lse, part_lse: `[B, H, N]`, natural log-sum-exp over the same keys; -inf, with an average of 0, where a row sees
            none of them.
        result: what to write instead of `out`, in the dtype that it has: the last merge rounds in the same pass.

    out + (part - out) w with w = sigmoid(part_lse - lse), the part's share of the sum: no weight is ever above 1, and
    an average that both parts share stays itself. A row that sees no key in either stays 0 and -inf, where -inf - -inf
    would be NaN. On a GPU one kernel does it all, and leaves alone what the part's keys show nothing to.
    """
    if out.is_cuda and out.dtype == torch.float32:
        merge(out, lse, part, part_lse, out if result is None else result)
        return
    share = torch.sigmoid(part_lse - lse).nan_to_num_(nan=0.0).transpose(1, 2).unsqueeze(-1)
    if result is None:
        torch.lerp(out, part, share, out=out)
    else:
        result.copy_(torch.lerp(out, part, share))
    torch.logaddexp(lse, part_lse, out=lse)
