"""The portable backward kernels: dQ by row-block, dK and dV by column-block. No atomics, so bitwise repeatable.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, split in two so that every output has one writer.
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
    load_vector,
    mask_group,
    read_runs,
)


@triton.jit
def backward_q_kernel(
    p_q,
    k,  # a pointer or, if TMA, a descriptor, as v
    v,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
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
    stride_dqb,
    stride_dqn,
    stride_dqh,
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
    KV_SHARE: tl.constexpr,
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
):
    LOG2E: tl.constexpr = 1.4426950408889634
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
    inside = o_m < n_q
    # [BM, D], [BM, DV]
    b_q = load_rows(p_q + b * stride_qb + h * stride_qh, m0, n_q, stride_qn, o_d, D, BLOCK_M, False, UPCAST)
    b_do = load_rows(p_dout + b * stride_ob + h * stride_oh, m0, n_q, stride_on, o_dv, D_V, BLOCK_M, False, UPCAST)
    p_row = (b * heads + h) * n_q + o_m
    b_lse = tl.load(p_lse + p_row, mask=inside, other=float("-inf"))
    # exp2(s - inf) = 0: a row that sees nothing has no gradient.
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E
    b_delta = tl.load(p_delta + p_row, mask=inside, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    factor = 1.0 if SOFTCAP else scale
    run = tl.load(p_first + first + block)
    stop = run + tl.load(p_count + first + block)
    while run < stop:
        begin, full, rest, end, run = read_runs(p_runs, run, stop, TMA and INTERVALS != 0)
        for tile in range(begin, end):
            partial = (tile < full) | (tile >= rest) if TMA and INTERVALS != 0 else full > 0
            n0 = tile * BLOCK_N
            o_n = (n0 + tl.arange(0, BLOCK_N))[None, :]
            bounds = load_bounds(p_bounds, o_n, stride_bi, partial, 0 if LATE else INTERVALS)
            # [BN, D], [BN, DV]
            b_k = fetch_rows(k, b, h_kv, n0, n_k, stride_kb, stride_kn, stride_kh, o_d, D, BLOCK_N, EVEN, UPCAST, TMA)
            b_v = fetch_rows(
                v, b, h_kv, n0, n_k, stride_vb, stride_vn, stride_vh, o_dv, D_V, BLOCK_N, EVEN, UPCAST, TMA
            )
            # [BM, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if SOFTCAP:
                b_s = cap_scores(b_s, scale, softcap)
            b_p = tl.exp2(b_s * (factor * LOG2E) - b_lse[:, None])
            if partial:
                diagonal = m0 < n0 + BLOCK_N - 1 - (n_k - n_q)
                b_p = hide(
                    b_p, o_m[:, None], o_n, diagonal, bounds, p_bounds, stride_bi, n_q, n_k, intervals, n0, 0.0,
                    CAUSAL, INTERVALS, LATE, True,
                )  # fmt: skip
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[:, None])
            if SOFTCAP:
                b_ds = b_ds * (1.0 - b_s * b_s / (softcap * softcap))
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    p_dq += b * stride_dqb + h * stride_dqh
    p_rows = p_dq + o_m[:, None].to(tl.int64) * stride_dqn + o_d
    tl.store(p_rows, (b_dq * scale).to(p_dq.dtype.element_ty), mask=inside[:, None] & (o_d < D))


@triton.jit
def backward_kv_kernel(
    q,  # a pointer or, if TMA, a descriptor, as dout and stats
    p_k,
    p_v,
    dout,
    stats,
    p_dk,
    p_dv,
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
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
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
    KV_SHARE: tl.constexpr,
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
):
    LOG2E: tl.constexpr = 1.4426950408889634
    b, h_kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    # The first query head's order serves the whole group of heads: it only decides when a block runs.
    first = mask_group(tl.program_id(2), tl.program_id(1) * KV_SHARE, heads, mask_batch, mask_heads) * blocks
    block = tl.load(p_order + first + tl.program_id(0))

    n0 = block * BLOCK_N
    o_n = n0 + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    # [BN, D], [BN, DV]
    b_k = load_rows(p_k + b * stride_kb + h_kv * stride_kh, n0, n_k, stride_kn, o_d, D, BLOCK_N, False, UPCAST)
    b_v = load_rows(p_v + b * stride_vb + h_kv * stride_vh, n0, n_k, stride_vn, o_dv, D_V, BLOCK_N, False, UPCAST)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    factor = 1.0 if SOFTCAP else scale
    row_blocks = (n_q + BLOCK_M - 1) // BLOCK_M
    # The query heads that share this key/value head are summed here, in order, instead of by atomics.
    for shared in range(KV_SHARE):
        h = h_kv * KV_SHARE + shared
        group = mask_group(tl.program_id(2), tl.program_id(1) * KV_SHARE + shared, heads, mask_batch, mask_heads)
        first_row_block = (b * heads + h) * row_blocks
        p_hidden = p_bounds + group * stride_bg
        bounds = load_bounds(p_hidden, o_n[:, None], stride_bi, True, INTERVALS)
        run = tl.load(p_first + group * blocks + block)
        stop = run + tl.load(p_count + group * blocks + block)
        while run < stop:
            begin, full, rest, end, run = read_runs(p_runs, run, stop, TMA and INTERVALS != 0)
            for tile in range(begin, end):
                partial = (tile < full) | (tile >= rest) if TMA and INTERVALS != 0 else full > 0
                m0 = tile * BLOCK_M
                o_r = tl.arange(0, BLOCK_M)[None, :]
                if not TMA:
                    # [1, BM]
                    p_row = stats + (first_row_block + tile) * (2 * BLOCK_M) + o_r
                    b_lse, b_delta = load_vector(p_row, n_q > 0), load_vector(p_row + BLOCK_M, n_q > 0)
                # [BM, D]
                b_q = fetch_rows(q, b, h, m0, n_q, stride_qb, stride_qn, stride_qh, o_d, D, BLOCK_M, EVEN, UPCAST, TMA)
                # [BN, BM]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                if SOFTCAP:
                    b_s = cap_scores(b_s, scale, softcap)
                if TMA:
                    # Out of shared memory where they are needed, so that they occupy registers no longer.
                    b_lse = stats.load([2 * (first_row_block.to(tl.int32) + tile), 0])
                b_p = tl.exp2(b_s * (factor * LOG2E) - b_lse)
                if partial:
                    diagonal = m0 < block * BLOCK_N + BLOCK_N - 1 - (n_k - n_q)
                    b_p = hide_once(
                        b_p, m0 + o_r, o_n[:, None], diagonal, bounds, p_hidden, stride_bi, n_q, n_k, intervals, n0,
                        0.0, CAUSAL, INTERVALS, TMA and CAUSAL and INTERVALS != 0,
                    )  # fmt: skip
                # [BM, DV]
                b_do = fetch_rows(
                    dout, b, h, m0, n_q, stride_ob, stride_on, stride_oh, o_dv, D_V, BLOCK_M, EVEN, UPCAST, TMA
                )
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                if TMA:
                    b_delta = stats.load([2 * (first_row_block.to(tl.int32) + tile) + 1, 0])
                b_ds = b_p * (b_dp - b_delta)
                if SOFTCAP:
                    b_ds = b_ds * (1.0 - b_s * b_s / (softcap * softcap))
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    inside_n = (o_n < n_k)[:, None]
    p_dk += b * stride_dkb + h_kv * stride_dkh
    p_rows = p_dk + o_n[:, None].to(tl.int64) * stride_dkn + o_d
    tl.store(p_rows, (b_dk * scale).to(p_dk.dtype.element_ty), mask=inside_n & (o_d < D))
    p_dv += b * stride_dvb + h_kv * stride_dvh
    p_rows = p_dv + o_n[:, None].to(tl.int64) * stride_dvn + o_dv
    tl.store(p_rows, b_dv.to(p_dv.dtype.element_ty), mask=inside_n & (o_dv < D_V))
