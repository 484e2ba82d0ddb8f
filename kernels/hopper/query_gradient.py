"""The Hopper kernel for dQ alone, in Gluon: what a bitwise repeatable backward takes beside dK and dV.

As the forward: a TMA producer warp walks the row-block's tiles, two consumer warpgroups own 64 query rows each.
Every dQ has one writer and one order of summation. dS goes to the tensor cores from registers.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, the part of it that belongs to a row-block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fm_longctx.kernels.hopper.primitives import hide_rows, next_tile, open_list, peek


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    bounds_desc,
    q_s,
    dout_s,
    k_s,
    v_s,
    bounds_s,
    rows_full,
    full,
    empty,
    p_runs,
    p_first,
    at,
    tiles,
    b,
    h,
    h_kv,
    bounds_row,
    m0,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
):
    for w in gl.static_range(2):
        bar = rows_full.index(w)
        mbarrier.expect(bar, q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, m0 + 64 * w, h, 0], bar, q_s.index(w))
        tma.async_copy_global_to_shared(dout_desc, [b, m0 + 64 * w, h, 0], bar, dout_s.index(w))
    size: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes
    run, tile, end, partial = open_list(p_first, p_runs, at)
    for i in range(tiles):
        stage = i % STAGES
        bar = full.index(stage)
        n0 = tile * BLOCK_N
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        if INTERVALS > 0:
            mbarrier.expect(bar, size + bounds_desc.block_type.nbytes, pred=partial != 0)
            mbarrier.expect(bar, size, pred=partial == 0)
            tma.async_copy_global_to_shared(
                bounds_desc, [bounds_row, n0], bar, bounds_s.index(stage), pred=partial != 0
            )
        else:
            mbarrier.expect(bar, size)
        tma.async_copy_global_to_shared(k_desc, [b, n0, h_kv, 0], bar, k_s.index(stage))
        tma.async_copy_global_to_shared(v_desc, [b, n0, h_kv, 0], bar, v_s.index(stage))
        word, word_end = peek(p_runs, run)
        run, tile, end, partial = next_tile(run, tile, end, partial, word, word_end)


@gluon.jit
def _consume(
    w: gl.constexpr,
    dq_desc,
    p_dq,
    p_lse,
    p_delta,
    stride_dn,
    q_s,
    dout_s,
    k_s,
    v_s,
    bounds_s,
    rows_full,
    full,
    empty,
    p_runs,
    p_first,
    at,
    tiles,
    b,
    h,
    m0,
    n_q,
    n_k,
    scale,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA_STORE: gl.constexpr,
):
    LOG2E: gl.constexpr = 1.4426950408889634
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DS: gl.constexpr = gl.DotOperandLayout(0, DQ, 2)
    dtype: gl.constexpr = q_s.dtype
    scale_log2 = scale * LOG2E
    m_w = m0 + 64 * w
    o_m = m_w + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    b_lse = gl.load(p_lse + o_m, mask=o_m < n_q, other=float("-inf"))
    # exp2(s - inf) = 0: a row that sees nothing has no gradient.
    b_lse = gl.expand_dims(gl.where(b_lse == float("-inf"), float("inf"), b_lse) * LOG2E, 1)
    b_delta = gl.expand_dims(gl.load(p_delta + o_m, mask=o_m < n_q, other=0.0), 1)
    dq = gl.full([64, D], 0.0, gl.float32, DQ)
    blank = gl.full([64, BLOCK_N], 0.0, gl.float32, S)
    q = q_s.index(w).reshape([64, D])
    dout = dout_s.index(w).reshape([64, D])
    mbarrier.wait(rows_full.index(w), 0)

    run, tile, end, partial = open_list(p_first, p_runs, at)
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        n0 = tile * BLOCK_N
        k = k_s.index(stage).reshape([BLOCK_N, D])
        v = v_s.index(stage).reshape([BLOCK_N, D])
        mbarrier.wait(full.index(stage), phase)
        s = warpgroup_mma(q, k.permute((1, 0)), blank, use_acc=False, is_async=True)
        dp = warpgroup_mma(dout, v.permute((1, 0)), blank, use_acc=False, is_async=True)
        word, word_end = peek(p_runs, run)
        s = warpgroup_mma_wait(1, deps=(s,))
        if partial:
            s = hide_rows(s, o_m, m_w, n0, n_q, n_k, bounds_s.index(stage), BLOCK_N, S, CAUSAL, INTERVALS)
        p = gl.exp2(s * scale_log2 - b_lse)
        # Long complete. But waiting is a loop, which ends the basic block, and that keeps ptxas from hoisting the
        # wait for dP above the exponentials that are to hide it.
        mbarrier.wait(full.index(stage), phase)
        run, tile, end, partial = next_tile(run, tile, end, partial, word, word_end)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = gl.convert_layout((p * (dp - b_delta)).to(dtype), DS)
        token = warpgroup_mma(ds, k, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(empty.index(stage), count=1)

    dq = dq * scale
    if TMA_STORE:
        # Q is not needed any more: its buffer carries dQ, which TMA clips at the last row.
        out = q_s.index(w)._reinterpret(dtype, [1, 64, 1, D], dq_desc.layout)
        out.reshape([64, D]).store(dq.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [b, m0 + 64 * w, h, 0], out)
        tma.store_wait(0)
    else:
        o_row = gl.expand_dims(m0 + 64 * w + gl.arange(0, 64, layout=gl.SliceLayout(1, DQ)), 1)
        o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, DQ)), 0)
        gl.store(p_dq + o_row.to(gl.int64) * stride_dn + o_d, dq, mask=o_row < n_q)


@gluon.jit
def query_gradient_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dq_desc,
    bounds_desc,
    p_dq,
    p_lse,
    p_delta,
    p_runs,
    p_first,
    p_tiles,
    p_order,
    stride_db,
    stride_dn,
    stride_dh,
    n_q,
    n_k,
    heads,
    mask_batch,
    mask_heads,
    scale,
    KV_SHARE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA_STORE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    b, h = gl.program_id(2), gl.program_id(1)
    group = (b % mask_batch) * mask_heads + h // (heads // mask_heads)
    first = group * gl.num_programs(0)
    block = gl.load(p_order + first + gl.program_id(0))
    at = first + block
    tiles = gl.load(p_tiles + at)
    row = (b.to(gl.int64) * heads + h) * n_q
    p_lse += row
    p_delta += row
    p_dq += b.to(gl.int64) * stride_db + h * stride_dh
    m0 = block * 128

    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], q_desc.layout)
    dout_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], dout_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], v_desc.layout)
    bounds_s = gl.allocate_shared_memory(gl.int32, [STAGES, bounds_desc.block_shape[0], BLOCK_N], bounds_desc.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(2):
        mbarrier.init(rows_full.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()

    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (0, dq_desc, p_dq, p_lse, p_delta, stride_dn, q_s, dout_s, k_s, v_s, bounds_s,
                        rows_full, full, empty, p_runs, p_first, at, tiles, b, h, m0, n_q, n_k, scale,
                        BLOCK_N, D, STAGES, INTERVALS, CAUSAL, TMA_STORE)),
            (_consume, (1, dq_desc, p_dq, p_lse, p_delta, stride_dn, q_s, dout_s, k_s, v_s, bounds_s,
                        rows_full, full, empty, p_runs, p_first, at, tiles, b, h, m0, n_q, n_k, scale,
                        BLOCK_N, D, STAGES, INTERVALS, CAUSAL, TMA_STORE)),
            (_produce, (q_desc, k_desc, v_desc, dout_desc, bounds_desc, q_s, dout_s, k_s, v_s, bounds_s,
                        rows_full, full, empty, p_runs, p_first, at, tiles, b, h, h // KV_SHARE,
                        group * bounds_desc.block_shape[0], m0, BLOCK_N, STAGES, INTERVALS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )
    # fmt: on
