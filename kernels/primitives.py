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
    p_tile = p + tl.cast(first, tl.int64) * stride + o_r * stride + o_d
    if o_d.shape[1] == D:
        b = tl.load(p_tile)
    else:
        b = tl.load(p_tile, mask=o_d < D, other=0.0)
    # The interpreter's bf16 products are wrong; on a GPU this is never asked for.
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def load_bounds(p_starts, p_ends, o_n, n_k, INTERVALS: tl.constexpr):
    """The intervals of columns o_n: starts and ends in turn, a tuple. Empty if their number is not known (-1)."""
    bounds = ()
    for i in tl.static_range(INTERVALS):
        b_start = tl.load(p_starts + i * n_k + o_n, mask=o_n < n_k, other=0)
        b_end = tl.load(p_ends + i * n_k + o_n, mask=o_n < n_k, other=0)
        bounds = bounds + (b_start, b_end)
    return bounds


@triton.jit
def visible(
    o_m,
    o_n,
    bounds,
    p_starts,
    p_ends,
    n_q,
    n_k,
    intervals,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
):
    """Which scores of a tile are visible; o_m and o_n index rows and columns, `[BM, 1]` and `[1, BN]` or transposed.

    INTERVALS is the number of intervals a column, given as `bounds`; or -1, and a loop goes through `intervals` of them.
    """
    inside = o_n < n_k
    # A column past the end is hidden from all rows by whatever test there is, so that only columns pay for it.
    if CAUSAL:
        see = o_m >= tl.where(inside, o_n - (n_k - n_q), 2147483647)
    else:
        see = inside & (o_m >= 0)
    for i in tl.static_range(INTERVALS):
        see = see & ((o_m < bounds[2 * i]) | (o_m >= bounds[2 * i + 1]))
    if INTERVALS < 0:
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
def read_run(p_runs, run):
    """First tile, the tile after the last, and whether the tiles are partial, of run `run`."""
    word = tl.load(p_runs + 2 * run)
    return word >> 1, tl.load(p_runs + 2 * run + 1), word & 1
