"""Joining attention over parts of the keys: two outputs in one pass, and the gradients that other ranks return."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 16
_WIDTH = 1024


@triton.jit
def merge_kernel(
    p_out,
    p_part,
    p_result,
    p_lse,
    p_part_lse,
    stride_ob,
    stride_on,
    stride_oh,
    stride_pb,
    stride_pn,
    stride_ph,
    stride_rb,
    stride_rn,
    stride_rh,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_sb,
    stride_sh,
    stride_sn,
    n_q,
    IN_PLACE: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_DV)[None, :]
    inside = o_m < n_q
    p_l = p_lse + b * stride_lb + h * stride_lh + o_m * stride_ln
    # [BLOCK]
    b_lse = tl.load(p_l, mask=inside, other=float("-inf"))
    b_part = tl.load(p_part_lse + b * stride_sb + h * stride_sh + o_m * stride_sn, mask=inside, other=float("-inf"))
    # Every warp reads these few numbers for itself, and one writes them: not before all have read.
    tl.debug_barrier()
    # A row that the part's keys show nothing to keeps what it has: neither output of it is read.
    joins = b_part > float("-inf")
    b_max = tl.where(joins, tl.maximum(b_lse, b_part), 0.0)
    b_far = tl.exp(tl.where(joins, b_lse - b_max, 0.0))
    b_near = tl.exp(b_part - b_max)
    b_sum = b_far + b_near
    tl.store(p_l, b_max + tl.log(b_sum), mask=joins)
    b_share = b_near / b_sum

    p_o = p_out + b * stride_ob + h * stride_oh + o_m[:, None] * stride_on + o_d
    p_p = p_part + b * stride_pb + h * stride_ph + o_m[:, None] * stride_pn + o_d
    p_r = p_result + b * stride_rb + h * stride_rh + o_m[:, None] * stride_rn + o_d
    here = (joins if IN_PLACE else inside)[:, None] & (o_d < D_V)
    # [BLOCK, DV]
    b_out = tl.load(p_o, mask=here, other=0.0)
    b_new = tl.load(p_p, mask=here & joins[:, None], other=0.0)
    # From the nearer end, so that a share of 0 or 1 is exact.
    b_more = tl.where(joins[:, None], b_new - b_out, 0.0)
    b_low, b_high = b_out + b_more * b_share[:, None], b_new - b_more * (b_far / b_sum)[:, None]
    b_result = tl.where(b_share[:, None] < 0.5, b_low, b_high)
    tl.store(p_r, b_result.to(p_result.dtype.element_ty), mask=here)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, result: Tensor) -> None:
    """Merge a part into `result` and, in place, into `lse`.

    Args:
        out, part: float32 `[B, N, H, D_v]`.
        lse, part_lse: float32 `[B, H, N]`, natural log; -inf where a row sees none of the keys.
        result: `[B, N, H, D_v]` of any floating dtype; may be `out` itself. Then rows that see none of the part's keys
            are not touched.
    """
    b, n_q, h, d_v = out.shape
    if out.numel() == 0:
        return
    for name, x in (("out", out), ("part", part), ("result", result)):
        if x.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, got strides {x.stride()}.")
    with torch.cuda.device_of(out):
        merge_kernel[(triton.cdiv(n_q, _BLOCK), h, b)](
            out,
            part,
            result,
            lse,
            part_lse,
            *out.stride()[:3],
            *part.stride()[:3],
            *result.stride()[:3],
            *lse.stride(),
            *part_lse.stride(),
            n_q,
            IN_PLACE=result.data_ptr() == out.data_ptr(),
            D_V=d_v,
            BLOCK_DV=triton.next_power_of_2(d_v),
            BLOCK=_BLOCK,
        )


@triton.jit
def add_rows_kernel(p_total, p_returned, p_rows, p_order, n, width, BLOCK: tl.constexpr):
    # A program for each returned row; that of the first one of a row adds them all, in their order.
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(p_rows + entry)
    before = tl.load(p_rows + entry - 1, mask=entry > 0, other=-1)
    if row != before:
        o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = o_w < width
        p_t = p_total + row * width + o_w
        # [BLOCK]
        b_sum = tl.load(p_t, mask=inside, other=0.0)
        following = row
        while following == row:
            b_sum += tl.load(p_returned + tl.load(p_order + entry) * width + o_w, mask=inside, other=0.0)
            entry += 1
            following = tl.load(p_rows + entry, mask=entry < n, other=-1)
        tl.store(p_t, b_sum, mask=inside)


def add_rows(total: Tensor, returned: Tensor, rows: Tensor, order: Tensor) -> None:
    """Add rows of `returned` to rows of `total`, in place: those of one row in their order, one by one.

    Args:
        total: float32 `[T, ...]`, contiguous.
        returned: float32 `[n, ...]`, contiguous, of the same row shape.
        rows: int64 `[n]`, ascending: where each goes.
        order: int64 `[n]`: which row of `returned` it is.
    """
    if returned.numel() == 0:
        return
    width = returned[0].numel()
    with torch.cuda.device_of(total):
        add_rows_kernel[(len(rows), triton.cdiv(width, _WIDTH))](
            total, returned, rows, order, len(rows), width, BLOCK=_WIDTH
        )
