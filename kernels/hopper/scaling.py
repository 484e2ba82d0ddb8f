"""dQ out of its sum, after the Hopper backward kernel."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(p_sum, p_out, scale, n_q, stride_sb, stride_ob, stride_n, D: tl.constexpr):
    """out = scale * sum, of 64 rows of one head; `[B, N, H, D]`, and they may be the same memory if N is.

    Each 64 x 64 tile of the sum lies in the order in which a warpgroup holds it (`HELD` of backward.py). As bits of the
    place, slowest first: group of 8 columns, warp (16 rows), row, pair of columns, half of the warp's rows, column.
    """
    b = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * 64 + tl.arange(0, 64)
    o_d = tl.program_id(1) * D + tl.arange(0, 64)
    offsets = o_m.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    for d in tl.static_range(0, D, 64):
        b_sum = tl.load(p_sum + b * stride_sb + offsets + d)
        b_sum = b_sum.reshape(8, 4, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5).reshape(64, 64)
        # Nothing of a tile is written before all of it has been read.
        tl.debug_barrier()
        b_out = (b_sum * scale).to(p_out.dtype.element_ty)
        tl.store(p_out + b * stride_ob + offsets + d, b_out, mask=o_m[:, None] < n_q)
