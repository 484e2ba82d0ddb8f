"""The attentions that a model is trained with, everything else the same: ours, FlexAttention, SDPA with a dense mask.

All three go through transformers' own interface. The mask of each step is made anew inside the step, as in training,
in each arm's best form: our intervals and tile schedules; a block mask; an additive bfloat16 matrix, which SDPA would
otherwise make of a boolean one in every layer. Under selective checkpoints no arm repeats its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.mask_mods import block_mask, causal_document_mod
from fm_longctx.mask import FlashMask

# Larger masks are beyond the 32-bit offsets of SDPA's kernels.
MOST_SCORES = 2**31

MaskMaker = Callable[[Sequence[int], torch.device, torch.dtype], dict[str, Any]]


def flashmask(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {"flashmask": FlashMask.from_lengths(lengths).to(device)}


def flex(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    kind = str(device)
    return {"attention_mask": block_mask(causal_document_mod(list(lengths), kind), sum(lengths), kind)}


def dense(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """`[1, 1, N, N]`: 0 where a row sees a column, -inf elsewhere."""
    n = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    mask = torch.full((1, 1, n, n), -torch.inf, dtype=dtype, device=device)
    column = torch.arange(n, device=device)
    # A strip of rows at a time: the booleans of all would be as large again.
    for first in range(0, n, 4096):
        rows = slice(first, min(first + 4096, n))
        seen = (column[rows, None] >= column) & (document[rows, None] == document)
        mask[0, 0, rows].masked_fill_(seen, 0.0)
    return {"attention_mask": mask}


MAKERS: dict[str, MaskMaker] = {"ours": flashmask, "ours_nearest": flashmask, "flex": flex, "dense": dense}


def use(causal_lm: Any, arm: str) -> None:
    """Give the model the arm's attention."""
    if arm in ("flex", "dense"):
        name = f"benchmark_{arm}"
        _register(name, arm)
        causal_lm.set_attn_implementation(name)


def _sdpa_in_strips(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA, of as many rows at a time as `MOST_SCORES` allows."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows = max(1, MOST_SCORES // attention_mask.shape[-1])
    parts = zip(query.split(rows, 2), attention_mask.split(rows, 2), strict=True)
    out = [sdpa_attention_forward(module, q, key, value, mask, **kwargs)[0] for q, mask in parts]
    return out[0] if len(out) == 1 else torch.cat(out, 1), None


def _register(name: str, arm: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.flex_attention import flex_attention_forward

    forward = flex_attention_forward if arm == "flex" else _sdpa_in_strips

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        once: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = forward(module, q, k, v, attention_mask, **kwargs)[0]
            return out

        return (attend if once is None else lambda *qkv: once(attend, *qkv))(query, key, value), None

    def as_given(*, attention_mask: Any = None, **kwargs: Any) -> Any:
        return attention_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, as_given)
