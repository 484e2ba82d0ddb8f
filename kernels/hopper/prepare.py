"""What runs before and after the Hopper backward kernels: row statistics in TMA's layout, and dQ out of its sum."""

import triton
import triton.language as tl


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


@triton.jit
def scale_kernel(p_sum, p_out, scale, count, BLOCK: tl.constexpr):
    """out = scale * sum, element by element; both contiguous, and they may be the same."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.load(p_sum + o, mask=o < count)
    tl.store(p_out + o, (b_sum * scale).to(p_out.dtype.element_ty), mask=o < count)
