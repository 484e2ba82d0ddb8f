"""The public op: validate, choose the backend, attend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fm_longctx.attention.library import attend
from fm_longctx.attention.passes import resolve_backend, torch_is_strict
from fm_longctx.attention.validation import validate
from fm_longctx.mask import FlashMask


@overload
def flashmask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor: ...


@overload
def flashmask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]: ...


def flashmask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention under any interval mask; its cost follows the unmasked area.

    Args:
        q: `[B, N_q, H, D]`, bfloat16, float16 or float32 (float64 on the reference backend). Any strides.
        k, v: `[B, N_k, H_kv, D]` and `[B, N_k, H_kv, D_v]`, q's dtype and device; H_kv divides H (GQA, MQA).
        mask: `N_q` rows and `N_k` columns; its batch is 1 or B, its heads 1, H_kv or H; on q's device.
        scale: multiplies the scores, > 0; `1 / sqrt(D)` if not given.
        softcap: > 0; scores, once scaled, become `softcap * tanh(score / softcap)` (Gemma). None leaves them.
        return_lse: also return the log-sum-exp of each row's visible scores. It is differentiable.
        backend: `"hopper"` (H100, H200), `"triton"` (any recent NVIDIA GPU, or a CPU under Triton's interpreter),
            `"reference"` (any device), or None to choose: on a GPU the first of these that takes the inputs, reference
            elsewhere; if that is not `"hopper"` on a GPU made for it, a warning says why, once for each reason. A
            named backend runs or raises; it never gives way to another.
        deterministic: bitwise repeatable gradients; also on while `torch.use_deterministic_algorithms(True)` is (with
            `warn_only` it is not). Outputs are always repeatable, and so are the gradients of `reference` and `triton`.

    Returns:
        out `[B, N_q, H, D_v]` in q's dtype; with `return_lse` also lse `[B, H, N_q]`, float32, natural logarithm. A row
        without a visible column gives out 0, lse -inf and gradient 0, never NaN.

    Raises:
        ValueError: inputs that do not fit together, or a backend that cannot take them; the message says what to do.

    Under autocast q, k and v are cast to its dtype. The mask's tile schedules are built at the first call, without
    waiting for the device, and cached on the mask for every other layer. Masks of more than 4 intervals a column take a
    kernel that loops over them instead of an unrolled one: right, and slower in partial tiles. There is no dropout.

    Source: FlashMask, arXiv 2410.01359.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    validate(q, k, v, mask)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}. Pass None for scores without a cap.")
    name = resolve_backend(backend, q, v, mask.num_intervals, softcap)
    cap = None if softcap is None else float(softcap)
    out, lse = attend(q, k, v, mask, float(scale), cap, name, deterministic or torch_is_strict())
    return (out, lse) if return_lse else out
