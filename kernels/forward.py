"""The portable forward kernel: one program per row-block and query head, online softmax over the tiles it visits.

What a row's exponentials are relative to is in most tiles not its maximum: `_walk` says why that is right for any
input, and which row-blocks are computed again.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, walking FlashMask's visible tiles only (arXiv 2410.01359).
"""

import triton
import triton.language as tl

from fm_longctx.kernels.primitives import (
    cap_scores,
    fetch_rows,
    hide,
    hide_once,
    load_bounds,
    load_rows,
    mask_group,
    read_runs,
)


@triton.jit
def _walk(
    b_q, k, v, p_bounds, p_runs, run, stop, b, h_kv, m0, n_q, n_k, intervals, scale, softcap,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_bi,
    CAUSAL: tl.constexpr, INTERVALS: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
    LATE: tl.constexpr, ONCE: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """Anchors and sums `[BM]` and outputs `[BM, DV]` of a row-block over runs `[run, stop)`.

    A row's anchor is the score that its exponentials, sum and outputs are relative to. Results do not depend on it but
    by rounding, as long as these are numbers and do not vanish. The usual anchor, the maximum so far, is one of many,
    and costs a comparison for each score, exchanges between threads before the first exponential, and a product for
    each output. If not MAXIMA, a row's anchor is the maximum of the first tile in which it sees a score above -inf, and
    stays:

    - Only while some row has no anchor are maxima looked for (`opening`): in most lists in one tile or two. A row that
      has none keeps -inf, p and sum 0.
    - An anchor is at most the maximum, and so the sum at least 1, but for rounding. What vanishes, below 2^-126, does
      not count. In float16 it would; that keeps the maxima.
    - Sums and p hold their precision to 2^128: up to scores 88 (natural units) above the anchor, less what large v
      take. Beyond, they are inf or NaN at the end, and the caller walks again, with MAXIMA. So inf and NaN in the
      inputs lead to what they lead to with maxima.
    - Which tiles are visited changes no bit: what is done to a row in a tile depends on that row alone, and where
      nothing is visible p is 0 and the anchor stays.

    ONCE: as `hide_once`, for P is summed and an operand.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    BLOCK_M: tl.constexpr = b_q.shape[0]
    o_m = m0 + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, b_q.shape[1])[None, :]
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M] if MAXIMA else [BLOCK_M, 8], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    opening = True

    # What multiplies a score before the exponential: capped scores are scaled already.
    factor = 1.0 if SOFTCAP else scale
    # A full mask has one run a block. At D 128 what telling runs apart costs in a tile is more than a pipeline's begin.
    JOINED: tl.constexpr = b_q.shape[1] <= 64 and (CAUSAL or INTERVALS != 0)
    while run < stop:
        begin, full, rest, end, run = read_runs(p_runs, run, stop, JOINED)
        for tile in range(begin, end):
            partial = (tile < full) | (tile >= rest) if JOINED else full > 0
            n0 = tile * BLOCK_N
            o_n = (n0 + tl.arange(0, BLOCK_N))[None, :]
            bounds = load_bounds(p_bounds, o_n, stride_bi, partial, 0 if LATE else INTERVALS)
            # [BN, D]
            b_k = fetch_rows(k, b, h_kv, n0, n_k, stride_kb, stride_kn, stride_kh, o_d, D, BLOCK_N, EVEN, UPCAST, TMA)
            # [BM, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if SOFTCAP:
                b_s = cap_scores(b_s, scale, softcap)
            if partial:
                diagonal = m0 < n0 + BLOCK_N - 1 - (n_k - n_q)
                if ONCE:
                    b_s = hide_once(
                        b_s, o_m[:, None], o_n, diagonal, bounds, p_bounds, stride_bi, n_q, n_k, intervals, n0,
                        float("-inf"), CAUSAL, INTERVALS, True, True,
                    )  # fmt: skip
                else:
                    b_s = hide(
                        b_s, o_m[:, None], o_n, diagonal, bounds, p_bounds, stride_bi, n_q, n_k, intervals, n0,
                        float("-inf"), CAUSAL, INTERVALS, LATE, True,
                    )  # fmt: skip
            b_new = b_top
            if MAXIMA:
                b_new = tl.maximum(b_top, tl.max(b_s, 1))
            elif opening:
                b_new = tl.where(b_top == float("-inf"), tl.max(b_s, 1), b_top)
                opening = tl.min(b_new, 0) == float("-inf")
            # A row that has seen no column yet: any finite anchor will do, and -inf would give NaN.
            b_anchor = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.exp2(b_s * (factor * LOG2E) - (b_anchor * (factor * LOG2E))[:, None])
            if MAXIMA:
                # The difference first: an unchanged maximum decays by exactly 1, so a hidden tile changes no bit.
                b_decay = tl.exp2((b_top - b_anchor) * (factor * LOG2E))
                b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            else:
                # What a thread holds of a row; the exchange with others comes once, at the end.
                b_sum += tl.sum(b_p.reshape(BLOCK_M, BLOCK_N // 8, 8), 1)
            # [BN, DV]
            b_v = fetch_rows(
                v, b, h_kv, n0, n_k, stride_vb, stride_vn, stride_vh, o_dv, D_V, BLOCK_N, EVEN, UPCAST, TMA
            )
            if MAXIMA:
                b_out = b_out * b_decay[:, None]
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
            b_top = b_new
    return b_top, b_sum if MAXIMA else tl.sum(b_sum, 1), b_out


@triton.jit
def forward_kernel(
    p_q,
    k,  # a pointer or, if TMA, a descriptor, as v
    v,
    p_out,
    p_lse,
    p_bounds,
    p_runs,
    p_first,
    p_count,
    p_order,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_on,
    stride_oh,
    stride_bg,
    stride_bi,
    n_q,
    n_k,
    heads,
    mask_batch,
    mask_heads,
    intervals,
    scale,
    softcap,
    KV_SHARE: tl.constexpr,  # query heads a key/value head
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    TMA: tl.constexpr,
    LATE: tl.constexpr,
    STEADY: tl.constexpr,
):
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = mask_group(tl.program_id(2), tl.program_id(1), heads, mask_batch, mask_heads)
    first = group * tl.num_programs(0)
    block = tl.load(p_order + first + tl.program_id(0))
    p_bounds += group * stride_bg
    h_kv = (tl.program_id(1) // KV_SHARE).to(tl.int64)

    m0 = block * BLOCK_M
    o_m = m0 + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    # [BM, D]
    b_q = load_rows(p_q + b * stride_qb + h * stride_qh, m0, n_q, stride_qn, o_d, D, BLOCK_M, False, UPCAST)

    factor = 1.0 if SOFTCAP else scale
    run = tl.load(p_first + first + block)
    stop = run + tl.load(p_count + first + block)
    ONCE: tl.constexpr = STEADY and CAUSAL and INTERVALS != 0 and not LATE
    # fmt: off
    walk = (b_q, k, v, p_bounds, p_runs, run, stop, b, h_kv, m0, n_q, n_k, intervals, scale, softcap,
            stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_bi)
    b_top, b_sum, b_out = _walk(
        *walk, CAUSAL, INTERVALS, SOFTCAP, D, D_V, BLOCK_DV, BLOCK_N, EVEN, UPCAST, TMA, LATE, ONCE, MAXIMA=not STEADY
    )
    if STEADY:
        # Not 0: some of them are no numbers. Rows past the end see what no row sees, as tiles are visited or not.
        b_wrong = tl.where(o_m < n_q, tl.sum(b_out * 0.0, 1) + b_sum * 0.0, 0.0)
        if tl.sum(b_wrong, 0) != 0.0:
            b_top, b_sum, b_out = _walk(
                *walk, CAUSAL, INTERVALS, SOFTCAP, D, D_V, BLOCK_DV, BLOCK_N, EVEN, UPCAST, TMA, LATE, ONCE, MAXIMA=True
            )
    # fmt: on

    seen = b_sum > 0.0
    # One division a row, for a division takes as long as the work of several scores.
    b_out = b_out * (1.0 / tl.where(seen, b_sum, 1.0))[:, None]
    b_lse = tl.where(seen, b_top * factor + tl.log(tl.where(seen, b_sum, 1.0)), float("-inf"))
    inside = o_m < n_q
    tl.store(p_lse + (b * heads + h) * n_q + o_m, b_lse, mask=inside)
    p_out += b * stride_ob + h * stride_oh
    p_rows = p_out + o_m[:, None].to(tl.int64) * stride_on + o_dv
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=inside[:, None] & (o_dv < D_V))
