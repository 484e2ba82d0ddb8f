"""Steps that the portable forward and backward kernels share.

Names: `p_` pointer, `o_` offsets (indices), `b_` tile in registers; `[BM, BN]` etc. are tile shapes.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(p, first, count, stride, o_d, D: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Tile `[BLOCK, D padded]` of rows first.. of a `[count, D]` matrix; o_d `[1, D padded]`.

    Rows past the end repeat the last one, which costs no predicate: whoever uses them must hide them. Offsets are
    relative to the tile's first row, so that only that address needs 64 bits.
    """
    o_r = tl.minimum(tl.arange(0, BLOCK), count - 1 - first)[:, None]
    p_tile = p + first.to(tl.int64) * stride + o_r * stride + o_d
    if o_d.shape[1] == D:
        b = tl.load(p_tile)
    else:
        b = tl.load(p_tile, mask=o_d < D, other=0.0)
    # The interpreter's bf16 products are wrong; on a GPU this is never asked for.
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def visible(
    o_m,
    o_n,
    p_starts,
    p_ends,
    n_q,
    n_k,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
):
    """Which scores of a tile are visible; o_m and o_n index rows and columns, `[BM, 1]` and `[1, BN]` or transposed."""
    inside = o_n < n_k
    see = inside & (o_m >= 0)
    if CAUSAL:
        see = see & (o_m >= o_n - (n_k - n_q))
    if INTERVALS <= 4:
        for i in tl.static_range(INTERVALS):
            b_start = tl.load(p_starts + i * n_k + o_n, mask=inside, other=0)
            b_end = tl.load(p_ends + i * n_k + o_n, mask=inside, other=0)
            see = see & ((o_m < b_start) | (o_m >= b_end))
    else:
        for i in range(INTERVALS):
            b_start = tl.load(p_starts + i * n_k + o_n, mask=inside, other=0)
            b_end = tl.load(p_ends + i * n_k + o_n, mask=inside, other=0)
            see = see & ((o_m < b_start) | (o_m >= b_end))
    return see


@triton.jit
def tile_list(p_offsets, p_order, rank, group, num_blocks):
    """The block that runs at this rank of a list group (longest list first), and its list `[begin, end)`."""
    block = tl.load(p_order + group * num_blocks + rank)
    p_list = p_offsets + group * num_blocks + block
    return block, tl.load(p_list), tl.load(p_list + 1)
