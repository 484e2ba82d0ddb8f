"""What the softmax's backward subtracts from every gradient of P, in one pass over the outputs and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32


@triton.jit
def delta_kernel(
    p_out,
    p_dout,
    p_dlse,
    p_delta,
    stride_ob,
    stride_on,
    stride_oh,
    stride_db,
    stride_dn,
    stride_dh,
    stride_lb,
    stride_lh,
    stride_ln,
    n_q,
    heads,
    HAS_DLSE: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_DV)[None, :]
    inside = o_m < n_q
    here = inside[:, None] & (o_d < D_V)
    p_o = p_out + b * stride_ob + h * stride_oh + o_m[:, None] * stride_on + o_d
    p_do = p_dout + b * stride_db + h * stride_dh + o_m[:, None] * stride_dn + o_d
    # [BLOCK, DV]
    b_out = tl.load(p_o, mask=here, other=0.0).to(tl.float32)
    b_dout = tl.load(p_do, mask=here, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_out * b_dout, 1)
    if HAS_DLSE:
        b_delta -= tl.load(p_dlse + b * stride_lb + h * stride_lh + o_m * stride_ln, mask=inside, other=0.0)
    tl.store(p_delta + (b * heads + h) * n_q + o_m, b_delta, mask=inside)


def compute_delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(out * dout) - dlse, float32 `[B, H, N_q]`; out, dout `[B, N_q, H, D_v]`, dlse `[B, H, N_q]`."""
    b, n_q, h, d_v = out.shape
    result = torch.empty((b, h, n_q), dtype=torch.float32, device=out.device)
    if result.numel() == 0:
        return result
    out, dout = (x if x.stride(-1) == 1 else x.contiguous() for x in (out, dout))
    with torch.cuda.device_of(out):
        delta_kernel[(triton.cdiv(n_q, _BLOCK), h, b)](
            out,
            dout,
            dlse,
            result,
            *out.stride()[:3],
            *dout.stride()[:3],
            *(dlse.stride() if dlse is not None else (0, 0, 0)),
            n_q,
            h,
            HAS_DLSE=dlse is not None,
            D_V=d_v,
            BLOCK_DV=triton.next_power_of_2(d_v),
            BLOCK=_BLOCK,
        )
    return result
