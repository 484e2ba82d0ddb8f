"""What a backward kernel that walks row-blocks reads of each row, block by block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 1024


@triton.jit
def statistics_kernel(
    p_lse,
    p_delta,
    p_stats,
    n_q,
    row_blocks,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """lse in units of log2 and delta, of `[B * H, n_q]`, to `[B * H, row_blocks, 2, BLOCK_M]`.

    An lse of +inf makes P zero: of rows that see nothing, and of rows that do not exist.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bh = tl.program_id(1).to(tl.int64)
    inside = o_m < n_q
    b_lse = tl.load(p_lse + bh * n_q + o_m, mask=inside, other=float("-inf"))
    b_delta = tl.load(p_delta + bh * n_q + o_m, mask=inside, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E
    p_block = p_stats + (bh * row_blocks + o_m // BLOCK_M) * (2 * BLOCK_M) + o_m % BLOCK_M
    exists = o_m < row_blocks * BLOCK_M
    tl.store(p_block, b_lse, mask=exists)
    tl.store(p_block + BLOCK_M, b_delta, mask=exists)


def row_statistics(lse: Tensor, delta: Tensor, block_m: int) -> Tensor:
    """float32 `[B * H * row-blocks * 2, block_m]`: of each row-block lse in units of log2, then delta.

    lse, delta: float32 `[B, H, N_q]`.
    """
    b, h, n_q = lse.shape
    blocks = triton.cdiv(n_q, block_m)
    stats = torch.empty((b * h * blocks * 2, block_m), dtype=torch.float32, device=lse.device)
    with torch.cuda.device_of(lse):
        statistics_kernel[(triton.cdiv(blocks * block_m, _ROWS), b * h)](
            lse.contiguous(), delta.contiguous(), stats, n_q, blocks, BLOCK_M=block_m, ROWS=_ROWS
        )
    return stats
