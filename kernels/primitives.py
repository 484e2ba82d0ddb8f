"""Steps that the portable forward and backward kernels share.

Names: `p_` pointer, `o_` offsets (indices), `b_` tile in registers; `[BM, BN]` etc. are tile shapes.
"""

import triton
import triton.language as tl


@triton.jit
def mask_group(b, h, heads, mask_batch, mask_heads):
    """Which of the B * H_mask masks sample b and query head h have, an int64.

    b and h are 32-bit: a division of 64 bits takes a hundred instructions.
    """
    return ((b % mask_batch) * mask_heads + h // (heads // mask_heads)).to(tl.int64)


@triton.jit
def load_rows(
    p, first, count, stride, o_d, D: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr
):
    """Tile `[BLOCK, D padded]` of rows first.. of a `[count, D]` matrix; o_d `[1, D padded]`.

    Rows past the end repeat the last one, which costs no predicate: whoever uses them must hide them. EVEN: BLOCK
    divides count, so there are none, and the offsets are the same for every tile. They are relative to the tile's
    first row, so that only that address needs 64 bits.
    """
    o_r = tl.arange(0, BLOCK)[:, None]
    if not EVEN:
        o_r = tl.minimum(o_r, count - 1 - first)
    p_tile = p + tl.cast(first, tl.int64) * stride + o_r * stride + o_d
    if o_d.shape[1] == D:
        b = tl.load(p_tile)
    else:
        b = tl.load(p_tile, mask=o_d < D, other=0.0)
    # The interpreter's bf16 products are wrong; on a GPU this is never asked for.
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def fetch_rows(
    source, b, h, first, count, stride_b, stride_n, stride_h, o_d,
    D: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile `[BLOCK, D padded]` of rows first.. of one head of `[B, N, H, D]`, as `load_rows`.

    TMA: source is a descriptor of boxes `[1, BLOCK, 1, D padded]`; rows past the end are then zero. One thread sends
    for the whole tile, so that no other computes an address or keeps one in registers.
    """
    if TMA:
        b_rows = source.load([b.to(tl.int32), first, h.to(tl.int32), 0]).reshape(BLOCK, o_d.shape[1])
        if UPCAST:
            b_rows = b_rows.to(tl.float32)
    else:
        b_rows = load_rows(source + b * stride_b + h * stride_h, first, count, stride_n, o_d, D, BLOCK, EVEN, UPCAST)
    return b_rows


@triton.jit
def load_vector(p, wanted):
    """What p, a row or column of pointers, points to; zeros unless `wanted`, a condition that is not known in advance.

    Without a branch around it Triton makes so small a load an asynchronous copy of every thread, one element at a time,
    which costs more than the products of a tile. To be called before the products, so that they hide its latency.
    """
    b = tl.zeros(p.shape, p.dtype.element_ty)
    if wanted:
        b = tl.load(p)
    return b


@triton.jit
def load_bounds(p_bounds, o_n, stride_bi, partial, INTERVALS: tl.constexpr):
    """Intervals of columns o_n if the tile is partial: of each start and 2^31 - 1 less the end, see `TileRuns.bounds`.

    A flat tuple; empty if INTERVALS is negative.
    """
    bounds = ()
    for i in tl.static_range(2 * INTERVALS):
        bounds = bounds + (load_vector(p_bounds + i * stride_bi + o_n, partial),)  # type: ignore[assignment]  # noqa: RUF005
    return bounds


@triton.jit
def load_pairs(p, first, BLOCK: tl.constexpr):
    """Row `[1, BLOCK]` of the int32 from p + first on, which is a multiple of 8 bytes, read two at a time.

    Of 128 numbers and no more threads Triton would load each once, and turn the layout of the scores to theirs. Half as
    many every thread reads for itself.
    """
    p_pairs = (p + first).to(tl.pointer_type(tl.int64), bitcast=True)
    b = tl.load(p_pairs + tl.arange(0, BLOCK // 2)[None, :])
    return tl.join(b.to(tl.int32), (b >> 32).to(tl.int32)).reshape(1, BLOCK)


@triton.jit
def hide(
    x,
    o_m,
    o_n,
    diagonal,
    bounds,
    p_bounds,
    stride_bi,
    n_q,
    n_k,
    intervals,
    n0,
    HIDDEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
    LATE: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """A tile with HIDDEN where it is masked; o_m and o_n index rows and columns, `[BM, 1]` and `[1, BN]` or transposed.

    diagonal: whether any of its columns is hidden from any of its rows by causality.
    INTERVALS is the number of intervals a column, given as `bounds` or, if LATE, read here, one at a time, of the
    columns from n0 on; or -1, and a loop reads `intervals` of them.
    Columns past the end are hidden: by their intervals if there are any, else by whatever test there is.
    BY_ROW: without intervals each row has a limit, else each column; the same, and one of them takes fewer registers.
    """
    LAST: tl.constexpr = 2147483647
    last = LAST
    if INTERVALS == 0:
        if CAUSAL and BY_ROW:
            x = tl.where(o_n <= tl.minimum(o_m + (n_k - n_q), n_k - 1), x, HIDDEN)
        elif CAUSAL:
            x = tl.where(o_m >= tl.where(o_n < n_k, o_n - (n_k - n_q), LAST), x, HIDDEN)
        else:
            x = tl.where(o_n < n_k, x, HIDDEN)
    elif CAUSAL:  # noqa: SIM102 (known when compiled; the other is not)
        # Of the tiles that intervals touch few meet the diagonal.
        if diagonal:
            x = tl.where(o_m >= o_n - (n_k - n_q), x, HIDDEN)
    if INTERVALS == 1 and not CAUSAL:
        # So little that LLVM would do it in every tile and then select. What loads it leaves behind the branch; this
        # loads the first column's start, which is not negative.
        last = LAST + tl.minimum(tl.load(p_bounds), 0)
    for i in tl.static_range(INTERVALS):
        if LATE:
            b_start = load_pairs(p_bounds + 2 * i * stride_bi, n0, x.shape[1])
            b_left = load_pairs(p_bounds + (2 * i + 1) * stride_bi, n0, x.shape[1])
        else:
            b_start, b_left = bounds[2 * i], bounds[2 * i + 1]
        x = tl.where((o_m >= b_start) & (b_left < last - o_m), HIDDEN, x)
    if INTERVALS < 0:
        for i in range(intervals):
            b_start = tl.load(p_bounds + 2 * i * stride_bi + o_n)
            b_left = tl.load(p_bounds + (2 * i + 1) * stride_bi + o_n)
            x = tl.where((o_m >= b_start) & (b_left < LAST - o_m), HIDDEN, x)
    return x


@triton.jit
def hide_once(
    x, o_m, o_n, diagonal, bounds, p_bounds, stride_bi, n_q, n_k, intervals, n0,
    HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, INTERVALS: tl.constexpr, REGISTERS: tl.constexpr,
    BY_ROW: tl.constexpr = False,
):  # fmt: skip
    """`hide` for a tile that is wanted as it is and as an operand, which is taken from REGISTERS or not.

    If it is, Triton has the branch give both, and hides each: four comparisons a score in place of two, and another
    tile in registers. It does not look through a loop, so here is one, of a single turn.
    """
    if REGISTERS:
        turns = 1
        while turns > 0:
            x = hide(
                x, o_m, o_n, diagonal, bounds, p_bounds, stride_bi, n_q, n_k, intervals, n0, HIDDEN, CAUSAL, INTERVALS,
                False, BY_ROW,
            )  # fmt: skip
            turns -= 1
    else:
        x = hide(
            x, o_m, o_n, diagonal, bounds, p_bounds, stride_bi, n_q, n_k, intervals, n0, HIDDEN, CAUSAL, INTERVALS,
            False, BY_ROW,
        )  # fmt: skip
    return x


@triton.jit
def cap_scores(b_s, scale, softcap):
    """softcap * tanh(scale * b_s / softcap), by way of one exponential."""
    LOG2E: tl.constexpr = 1.4426950408889634
    b_e = tl.exp2(b_s * (scale / softcap * 2 * LOG2E))
    return softcap - 2 * softcap / (b_e + 1)


@triton.jit
def read_runs(p_runs, run, stop, JOINED: tl.constexpr):
    """Tiles `[begin, end)` of run `run` and of those next to it, and the first run that is not among them.

    Of these tiles `[full, rest)` are full and the others partial: partial ones, full ones and partial ones without a
    gap are one loop, whose copies are under way from the first to the last. What a block sees of a document or a
    window is no more than that. Not JOINED: run `run` alone, and its tiles are partial if full > 0; fewer registers.

    stop: the block's last run + 1.
    """
    word, end = tl.load(p_runs + 2 * run), tl.load(p_runs + 2 * run + 1)
    begin, partial = word >> 1, (word & 1) != 0
    full, rest, following = tl.where(partial, 2147483647, 0), 2147483647, run + 1
    if JOINED:
        p_next, p_last = p_runs + 2 * tl.minimum(run + 1, stop - 1), p_runs + 2 * tl.minimum(run + 2, stop - 1)
        next_word, next_end = tl.load(p_next), tl.load(p_next + 1)
        last_word, last_end = tl.load(p_last), tl.load(p_last + 1)
        second = (run + 1 < stop) & (next_word >> 1 == end) & ((next_word ^ word) & 1 != 0)
        third = partial & second & (run + 2 < stop) & (last_word >> 1 == next_end) & (last_word & 1 != 0)
        full, rest = tl.where(partial, end, begin), tl.where(partial & second, next_end, end)
        end = tl.where(third, last_end, tl.where(second, next_end, end))
        following += second.to(tl.int32) + third.to(tl.int32)
    return begin, full, rest, end, following
