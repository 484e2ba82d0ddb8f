"""The raw passes, forward and backward, without autograd: what the op and context parallelism are built from."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_longctx.attention import reference
from fm_longctx.kernels import portable
from fm_longctx.mask import FlashMask

BACKENDS = {"reference": reference, "triton": portable}


def resolve_backend(backend: str | None, q: Tensor, v: Tensor) -> str:
    """The backend to run: the named one, or `triton` on a GPU and `reference` elsewhere.

    Raises:
        ValueError: an unknown name, or a backend that cannot take q's device or dtype. A named backend never gives way
            to another.
    """
    if backend is None:
        backend = "triton" if q.device.type == "cuda" and q.dtype in portable.DTYPES else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or None, got {backend!r}.")
    BACKENDS[backend].require(q, v)
    return backend


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    backend: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q `[B, N_q, H, D]` to k `[B, N_k, H_kv, D]` and v `[B, N_k, H_kv, D_v]` under the mask.

    N_q and N_k may be 0. Returns out `[B, N_q, H, D_v]` (q's dtype, or `out_dtype`) and lse `[B, H, N_q]`, float32 and
    natural log; a row without a visible column has out 0 and lse -inf.
    """
    # The backends choose the precision of each product themselves.
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].forward(q, k, v, mask, scale=scale, out_dtype=out_dtype or q.dtype)


def attention_delta(out: Tensor, dout: Tensor, dlse: Tensor | None = None) -> Tensor:
    """What the softmax's backward subtracts, `[B, H, N_q]`: rowsum(out * dout) - dlse, in float32 at least.

    out, dout `[B, N_q, H, D_v]`, out of the complete (merged) result; dlse `[B, H, N_q]`, the gradient of its lse.
    """
    exact = torch.promote_types(out.dtype, torch.float32)
    delta = (out.to(exact) * dout.to(exact)).sum(-1).transpose(1, 2)
    return (delta if dlse is None else delta - dlse).contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    backend: str,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for the gradient dout `[B, N_q, H, D_v]`, shaped as q, k, v, in their dtype or `grad_dtype`.

    lse and delta `[B, H, N_q]` belong to the complete result, of which k, v and mask may be one part. Rows whose lse is
    -inf get gradient 0. Bitwise repeatable: no backend uses atomics.
    """
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].backward(
            dout, q, k, v, lse, delta, mask, scale=scale, grad_dtype=grad_dtype or q.dtype
        )
