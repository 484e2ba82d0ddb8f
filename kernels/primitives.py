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
    intervals,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
):
    """Which scores of a tile are visible; o_m and o_n index rows and columns, `[BM, 1]` and `[1, BN]` or transposed.

    INTERVALS is the number of intervals a column, unrolled; or -1, and a loop goes through `intervals` of them.
    """
    inside = o_n < n_k
    see = inside & (o_m >= 0)
    if CAUSAL:
        see = see & (o_m >= o_n - (n_k - n_q))
    if INTERVALS >= 0:
        for i in tl.static_range(INTERVALS):
            b_start = tl.load(p_starts + i * n_k + o_n, mask=inside, other=0)
            b_end = tl.load(p_ends + i * n_k + o_n, mask=inside, other=0)
            see = see & ((o_m < b_start) | (o_m >= b_end))
    else:
        for i in range(intervals):
            b_start = tl.load(p_starts + i * n_k + o_n, mask=inside, other=0)
            b_end = tl.load(p_ends + i * n_k + o_n, mask=inside, other=0)
            see = see & ((o_m < b_start) | (o_m >= b_end))
    return see


@triton.jit
def cap_scores(b_s, scale, softcap):
    """softcap * tanh(scale * b_s / softcap), by way of one exponential."""
    LOG2E: tl.constexpr = 1.4426950408889634
    b_e = tl.exp2(b_s * (scale / softcap * 2 * LOG2E))
    return softcap - 2 * softcap / (b_e + 1)


@triton.jit
def open_list(p_first, p_runs, at):
    """Begin to walk the tiles of block `at` (a flat index): its first run, that run's first tile, end and flag."""
    run = tl.load(p_first + at)
    word = tl.load(p_runs + 2 * run)
    return run, word >> 1, tl.load(p_runs + 2 * run + 1), word & 1


@triton.jit
def next_tile(p_runs, run, tile, end, partial):
    """One tile on. The next run is read at every step, needed or not, so that nothing waits for it when it is."""
    word = tl.load(p_runs + 2 * run + 2)
    word_end = tl.load(p_runs + 2 * run + 3)
    more = tile + 1 < end
    run = tl.where(more, run, run + 1)
    tile = tl.where(more, tile + 1, word >> 1)
    partial = tl.where(more, partial, word & 1)
    return run, tile, tl.where(more, end, word_end), partial
