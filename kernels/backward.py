"""The portable backward kernels: dQ by row-block, dK and dV by column-block. No atomics, so bitwise repeatable.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, split in two so that every output has one writer.
"""

import triton
import triton.language as tl

from fm_longctx.kernels.primitives import cap_scores, load_bounds, load_rows, read_run, visible


@triton.jit
def add_to_query(
    b_q,
    b_do,
    p_k,
    p_v,
    b_lse,
    b_delta,
    b_dq,
    o_m,
    n0,
    o_d,
    o_dv,
    p_starts,
    p_ends,
    stride_kn,
    stride_vn,
    n_q,
    n_k,
    intervals,
    scale,
    softcap,
    PARTIAL: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of columns: dQ `[BM, D]` (still to be scaled) with its share added; b_lse `[BM]` in powers of two."""
    LOG2E: tl.constexpr = 1.4426950408889634
    factor = 1.0 if SOFTCAP else scale
    # [BN, D], [BN, DV]
    b_k = load_rows(p_k, n0, n_k, stride_kn, o_d, D, BLOCK_N, UPCAST)
    b_v = load_rows(p_v, n0, n_k, stride_vn, o_dv, D_V, BLOCK_N, UPCAST)
    # [BM, BN]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if SOFTCAP:
        b_s = cap_scores(b_s, scale, softcap)
    b_p = tl.exp2(b_s * (factor * LOG2E) - b_lse[:, None])
    if PARTIAL:
        o_n = (n0 + tl.arange(0, BLOCK_N))[None, :]
        bounds = load_bounds(p_starts, p_ends, o_n, n_k, INTERVALS)
        see = visible(o_m[:, None], o_n, bounds, p_starts, p_ends, n_q, n_k, intervals, CAUSAL, INTERVALS)
        b_p = tl.where(see, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    if SOFTCAP:
        b_ds = b_ds * (1.0 - b_s * b_s / (softcap * softcap))
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def add_to_key(
    b_k,
    b_v,
    p_q,
    p_do,
    p_lse,
    p_delta,
    b_dk,
    b_dv,
    o_n,
    bounds,
    partial,
    m0,
    o_d,
    o_dv,
    p_starts,
    p_ends,
    stride_qn,
    stride_on,
    n_q,
    n_k,
    intervals,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    INTERVALS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of rows: dK `[BN, D]` (still to be scaled) and dV `[BN, DV]` with their shares added."""
    LOG2E: tl.constexpr = 1.4426950408889634
    factor = 1.0 if SOFTCAP else scale
    o_m = m0 + tl.arange(0, BLOCK_M)
    inside = o_m < n_q
    # [BM, D], [BM, DV]
    b_q = load_rows(p_q, m0, n_q, stride_qn, o_d, D, BLOCK_M, UPCAST)
    b_do = load_rows(p_do, m0, n_q, stride_on, o_dv, D_V, BLOCK_M, UPCAST)
    b_lse = tl.load(p_lse + o_m, mask=inside, other=float("-inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E
    b_delta = tl.load(p_delta + o_m, mask=inside, other=0.0)
    # [BN, BM]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    if SOFTCAP:
        b_s = cap_scores(b_s, scale, softcap)
    b_p = tl.exp2(b_s * (factor * LOG2E) - b_lse[None, :])
    if partial:
        see = visible(o_m[None, :], o_n[:, None], bounds, p_starts, p_ends, n_q, n_k, intervals, CAUSAL, INTERVALS)
        b_p = tl.where(see, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    if SOFTCAP:
        b_ds = b_ds * (1.0 - b_s * b_s / (softcap * softcap))
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    p_starts,
    p_ends,
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
    UPCAST: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = (b % mask_batch) * mask_heads + h // (heads // mask_heads)
    first = group * tl.num_programs(0)
    block = tl.load(p_order + first + tl.program_id(0))
    p_starts += group * intervals * n_k
    p_ends += group * intervals * n_k
    p_k += b * stride_kb + (h // KV_SHARE) * stride_kh
    p_v += b * stride_vb + (h // KV_SHARE) * stride_vh

    m0 = block * BLOCK_M
    o_m = m0 + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    inside = o_m < n_q
    # [BM, D], [BM, DV]
    b_q = load_rows(p_q + b * stride_qb + h * stride_qh, m0, n_q, stride_qn, o_d, D, BLOCK_M, UPCAST)
    b_do = load_rows(p_dout + b * stride_ob + h * stride_oh, m0, n_q, stride_on, o_dv, D_V, BLOCK_M, UPCAST)
    p_row = (b * heads + h) * n_q + o_m
    b_lse = tl.load(p_lse + p_row, mask=inside, other=float("-inf"))
    # exp2(s - inf) = 0: a row that sees nothing has no gradient.
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E
    b_delta = tl.load(p_delta + p_row, mask=inside, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    run = tl.load(p_first + first + block)
    for r in range(run, run + tl.load(p_count + first + block)):
        tile, end, partial = read_run(p_runs, r)
        if partial:
            for t in range(tile, end):
                b_dq = add_to_query(
                    b_q, b_do, p_k, p_v, b_lse, b_delta, b_dq, o_m, t * BLOCK_N, o_d, o_dv, p_starts, p_ends, stride_kn,
                    stride_vn, n_q, n_k, intervals, scale, softcap, True, CAUSAL, INTERVALS, SOFTCAP, D, D_V, BLOCK_N,
                    UPCAST,
                )  # fmt: skip
        else:
            for t in range(tile, end):
                b_dq = add_to_query(
                    b_q, b_do, p_k, p_v, b_lse, b_delta, b_dq, o_m, t * BLOCK_N, o_d, o_dv, p_starts, p_ends, stride_kn,
                    stride_vn, n_q, n_k, intervals, scale, softcap, False, CAUSAL, INTERVALS, SOFTCAP, D, D_V, BLOCK_N,
                    UPCAST,
                )  # fmt: skip

    p_dq += b * stride_dqb + h * stride_dqh
    p_rows = p_dq + o_m[:, None].to(tl.int64) * stride_dqn + o_d
    tl.store(p_rows, (b_dq * scale).to(p_dq.dtype.element_ty), mask=inside[:, None] & (o_d < D))


@triton.jit
def backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_starts,
    p_ends,
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
    UPCAST: tl.constexpr,
):
    b, h_kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    # The first query head's order serves the whole group of heads: it only decides when a block runs.
    mask_head = h_kv * KV_SHARE // (heads // mask_heads)
    first = ((b % mask_batch) * mask_heads + mask_head) * blocks
    block = tl.load(p_order + first + tl.program_id(0))

    n0 = block * BLOCK_N
    o_n = n0 + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    # [BN, D], [BN, DV]
    b_k = load_rows(p_k + b * stride_kb + h_kv * stride_kh, n0, n_k, stride_kn, o_d, D, BLOCK_N, UPCAST)
    b_v = load_rows(p_v + b * stride_vb + h_kv * stride_vh, n0, n_k, stride_vn, o_dv, D_V, BLOCK_N, UPCAST)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # The query heads that share this key/value head are summed here, in order, instead of by atomics.
    for shared in range(KV_SHARE):
        h = h_kv * KV_SHARE + shared
        group = (b % mask_batch) * mask_heads + h // (heads // mask_heads)
        p_q_h = p_q + b * stride_qb + h * stride_qh
        p_do_h = p_dout + b * stride_ob + h * stride_oh
        p_s, p_e = p_starts + group * intervals * n_k, p_ends + group * intervals * n_k
        bounds = load_bounds(p_s, p_e, o_n[:, None], n_k, INTERVALS)
        p_row = (b * heads + h) * n_q
        run = tl.load(p_first + group * blocks + block)
        for r in range(run, run + tl.load(p_count + group * blocks + block)):
            tile, end, partial = read_run(p_runs, r)
            for t in range(tile, end):
                b_dk, b_dv = add_to_key(
                    b_k, b_v, p_q_h, p_do_h, p_lse + p_row, p_delta + p_row, b_dk, b_dv, o_n, bounds, partial,
                    t * BLOCK_M, o_d, o_dv, p_s, p_e, stride_qn, stride_on, n_q, n_k, intervals, scale, softcap, CAUSAL,
                    INTERVALS, SOFTCAP, D, D_V, BLOCK_M, UPCAST,
                )  # fmt: skip

    inside_n = (o_n < n_k)[:, None]
    p_dk += b * stride_dkb + h_kv * stride_dkh
    p_rows = p_dk + o_n[:, None].to(tl.int64) * stride_dkn + o_d
    tl.store(p_rows, (b_dk * scale).to(p_dk.dtype.element_ty), mask=inside_n & (o_d < D))
    p_dv += b * stride_dvb + h_kv * stride_dvh
    p_rows = p_dv + o_n[:, None].to(tl.int64) * stride_dvn + o_dv
    tl.store(p_rows, b_dv.to(p_dv.dtype.element_ty), mask=inside_n & (o_dv < D_V))
