"""Paddle's form of a mask: `startend_row_indices`, int32 `[B, H_mask, N_k, V]`, and what its vectors mean.

| causal | V | vectors                | masked rows of a column          |
|--------|---|------------------------|----------------------------------|
| True   | 1 | LTS                    | `[LTS, N_q)`                     |
| True   | 2 | LTS, LTE               | `[LTS, LTE)`                     |
| False  | 2 | LTS, UTE               | `[LTS, N_q)` and `[0, UTE)`      |
| False  | 4 | LTS, LTE, UTS, UTE     | `[LTS, LTE)` and `[UTS, UTE)`    |

LTS and LTE bound the interval in the lower triangle, UTS and UTE the one in the upper triangle. Causal adds the
diagonal, aligned bottom-right. Source: FlashMask, arXiv 2410.01359, section 4.1, and Paddle's `flashmask_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fm_longctx.mask.canonical import diagonal

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask

_VECTORS = {True: (1, 2), False: (2, 4)}


def to_intervals(indices: Tensor, *, causal: bool, num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """The vectors' intervals, as given: neither clipped nor sorted.

    Args:
        indices: int32 `[B, H_mask, N_k, V]`.
        causal: decides, with V, what the vectors mean (the table above).
        num_rows: N_q; N_k if not given.

    Returns:
        starts, ends: int32 `[B, H_mask, K, N_k]`; K is 1 when causal and else 2, the lower interval first.

    Raises:
        ValueError: not an int32 tensor of rank 4, a V that `causal` does not allow, or a bad row count.
    """
    if not isinstance(indices, Tensor):
        raise ValueError(
            f"startend_row_indices must be an int32 tensor [B, H_mask, N_k, V], got {type(indices).__name__}."
        )
    if indices.dtype != torch.int32:
        raise ValueError(f"startend_row_indices must be int32, got {indices.dtype}. Convert it with .to(torch.int32).")
    if indices.ndim != 4:
        raise ValueError(f"startend_row_indices must have shape [B, H_mask, N_k, V], got {list(indices.shape)}.")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r}.")
    vectors = indices.shape[-1]
    if vectors not in _VECTORS[causal]:
        other = f" With causal={not causal} it would be valid." if vectors in _VECTORS[not causal] else ""
        raise ValueError(
            f"causal={causal} takes 1 (LTS) or 2 (LTS, LTE) vectors a column, got {vectors}.{other}"
            if causal
            else f"causal=False takes 2 (LTS, UTE) or 4 (LTS, LTE, UTS, UTE) vectors a column, got {vectors}.{other}"
        )
    n_q = indices.shape[2] if num_rows is None else num_rows
    if isinstance(n_q, bool) or not isinstance(n_q, int) or not 0 <= n_q < 2**31:
        raise ValueError(f"num_rows must be an integer in [0, 2**31), got {num_rows!r}.")

    vector = indices.unbind(-1)
    top, bottom = torch.zeros_like(vector[0]), torch.full_like(vector[0], n_q)
    if causal:
        pairs = [(vector[0], vector[1] if vectors == 2 else bottom)]
    elif vectors == 2:
        pairs = [(vector[0], bottom), (top, vector[1])]
    else:
        pairs = [(vector[0], vector[1]), (vector[2], vector[3])]
    return torch.stack([start for start, _ in pairs], dim=2), torch.stack([end for _, end in pairs], dim=2)


def from_intervals(mask: FlashMask) -> Tensor:
    """The vectors of a mask, int32 `[B, H_mask, N_k, V]`, with the smallest V that says it under `mask.causal`.

    Where V = 4 the upper interval is the one that lies higher in the column, as kernels of this form expect.

    Raises:
        ValueError: a column has more intervals than the form can say (1 when causal, else 2); it is named.
    """
    n_q = mask.num_rows
    limit = 1 if mask.causal else 2
    if mask.num_intervals > limit:
        used = (mask.starts < mask.ends).sum(dim=2)
        b, h, column = (used > limit).nonzero()[0].tolist()
        raise ValueError(
            f"startend_row_indices says at most {limit} masked interval{'' if mask.causal else 's'} a column with "
            f"causal={mask.causal}, but column {column} (batch {b}, head {h}) has {int(used[b, h, column])}. "
            "Keep it as a FlashMask, which flashmask_attention takes as it is."
        )

    shape = (mask.batch, mask.heads, mask.num_columns)
    blank = torch.full(shape, n_q, dtype=torch.int32, device=mask.device)
    bounds = [(mask.starts[:, :, i], mask.ends[:, :, i]) for i in range(mask.num_intervals)]
    bounds += [(blank, blank)] * (limit - len(bounds))
    if mask.causal:
        start, end = bounds[0]
        return torch.stack([start] if bool((end == n_q).all()) else [start, end], dim=-1)

    # Sorted: of two intervals the first is the upper one. A lone one is lower iff it starts on or below the diagonal.
    (first_start, first_end), (second_start, second_end) = bounds
    lone = second_start == second_end
    lower = lone & (first_start >= diagonal(n_q, mask.num_columns, mask.device))
    # Two vectors suffice iff each interval touches its end of the column.
    lone_lower = lone & (first_end == n_q)
    lone_upper = lone & (first_start == 0) & ~lone_lower
    both = ~lone & (first_start == 0) & (second_end == n_q)
    if bool((lone_lower | lone_upper | both).all()):
        lts = torch.where(lone_lower, first_start, second_start)
        ute = torch.where(lone_lower, 0, first_end)
        return torch.stack([lts, ute], dim=-1)
    return torch.stack(
        [
            torch.where(lower, first_start, second_start),
            torch.where(lower, first_end, second_end),
            torch.where(lower, 0, first_start),
            torch.where(lower, 0, first_end),
        ],
        dim=-1,
    )
