"""The Hopper backward kernel, in Gluon: a TMA producer warp and two consumer warpgroups of 64 key columns each.

An item is 128 columns of one key/value head. A CTA takes one after the other: dK and dV stay in registers and have one
writer, while the producer streams Q and dO of the row-blocks that see them, and already those of the next item. It
walks a list from its end, and through the query heads of a group in the order that keeps dQ in the L2 cache (see
`_heads_together`). Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T:
P^T and dS^T are then laid out as the register operands of dV += P^T dO and dK += dS^T Q. For dQ = dS K the two
warpgroups exchange dS through shared memory, each computes a half of the tile's dQ over all 128 columns, and TMA adds
it to a float32 sum in global memory, whose order varies between runs. With DQ = False that part is left out, and what
remains is bitwise repeatable; query_gradient.py does the rest. With AHEAD, S^T of the next tile is computed while dK
and dV, or dQ, of this one are.

In the loop consumers tell each other and the producer by named barriers what they have done: warps come to these one by
one. At an mbarrier Gluon has one thread arrive for its warpgroup, which takes a barrier of the warpgroup before, and
another before it waits for the next one.

Source: FlashAttention-3 (arXiv 2407.08608), section 3 and its Hopper backward, over FlashMask's visible tiles.
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

from fm_longctx.kernels.hopper.primitives import (
    announce,
    hide_columns,
    meet,
    next_stage,
    open_walk,
    peek_walk,
    place_of,
    read_word,
    round_of,
    take,
    thread_barrier,
    tma_reduce_add,
    walk_on,
    write_word,
)

# Named barriers: Triton has the first ones, one for each warpgroup and two more. Of stages there is one each, from
# STAGE_EMPTY on. And how many threads come there: both consumers, or also the producer.
DS_FULL = gl.constexpr(8)
STAGE_EMPTY = gl.constexpr(9)
CONSUMERS = gl.constexpr(2 * 128)
ALL = gl.constexpr(2 * 128 + 32)


@gluon.jit
def _fetch(
    tile,
    partial,
    h,
    group,
    stage,
    phase,
    q_desc,
    dout_desc,
    stats_desc,
    q_s,
    dout_s,
    stats_s,
    word_s,
    full,
    b,
    heads,
    row_blocks,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One step: Q and dO of a row-block of query head h, and what the consumers need to know of the tile."""
    size: gl.constexpr = q_desc.block_type.nbytes + dout_desc.block_type.nbytes + stats_desc.block_type.nbytes
    bar = full.index(stage)
    meet(STAGE_EMPTY + stage, ALL)
    write_word(word_s.index(3 * stage), tile << 1 | partial)
    write_word(word_s.index(3 * stage + 1), h)
    write_word(word_s.index(3 * stage + 2), group)
    mbarrier.expect(bar, size)
    tma.async_copy_global_to_shared(q_desc, [b, tile * BLOCK_M, h, 0], bar, q_s.index(stage))
    stats_row = 2 * ((b * heads + h) * row_blocks + tile)
    tma.async_copy_global_to_shared(stats_desc, [stats_row, 0], bar, stats_s.index(stage))
    tma.async_copy_global_to_shared(dout_desc, [b, tile * BLOCK_M, h, 0], bar, dout_s.index(stage))
    return next_stage(stage, phase, STAGES)


@gluon.jit
def _heads_together(middle, longest, KV_SHARE: gl.constexpr, ONE_LIST: gl.constexpr):
    """How many query heads of a group are walked at each row-block; the others follow when the list is through.

    Lists of all lengths (documents, causal) would run apart from head to head: all at each row-block keeps those that
    began together at the same rows, and what they add to in the L2 cache. Lists of about one length (windows) each have
    rows of their own and keep step anyway: one head after the other then has the fewest rows in use.
    """
    together = KV_SHARE
    if KV_SHARE > 1:
        if ONE_LIST:
            together = gl.where(4 * middle < 3 * longest, KV_SHARE, 1)
        else:
            together = 1
    return together


@gluon.jit
def _from_end(place, h_kv, middle, longest, blocks, abreast, turns):
    """Whether a list is walked from its end, so that CTAs in flight read and add to the same rows.

    In the first of `launch.rounds` as many lists as there are CTAs begin together, and those of a document, or of a
    causal mask, all see its last row: from there they keep step. In the next round lists begin as those end, the
    longest first, each a tile after the one before, whose columns see a tile more: they keep step from the diagonal.
    But not if one round is all that heads take and some lists are far longer than most.
    """
    ragged = (turns == 1) & (5 * middle < 2 * longest)
    return ragged | (round_of(place, h_kv, blocks, abreast, turns) % 2 == 0)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    stats_desc,
    q_s,
    k_s,
    v_s,
    dout_s,
    stats_s,
    word_s,
    item_s,
    kv_full,
    kv_empty,
    full,
    p_runs,
    p_first,
    p_count,
    p_tiles,
    p_order,
    p_counter,
    blocks,
    items,
    abreast,
    last,
    turns,
    n_q,
    heads,
    mask_batch,
    mask_heads,
    KV_SHARE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    ONE_LIST: gl.constexpr,
):
    row_blocks = (n_q + BLOCK_M - 1) // BLOCK_M
    heads_kv = heads // KV_SHARE
    item = gl.program_id(0)
    stage, phase, turn = 0, 0, 0
    while item < items:
        place, bh = place_of(item, blocks, items // blocks, abreast, last)
        b = bh // heads_kv
        h_kv = bh - b * heads_kv
        # The first query head's order serves the whole group of heads: it only decides when a block runs.
        group = (b % mask_batch) * mask_heads + h_kv * KV_SHARE // (heads // mask_heads)
        p_blocks = p_order + group * blocks
        block = gl.load(p_blocks + place)
        longest = gl.load(p_tiles + group * blocks + gl.load(p_blocks))
        middle = gl.load(p_tiles + group * blocks + gl.load(p_blocks + blocks // 2))
        together = _heads_together(middle, longest, KV_SHARE, ONE_LIST)
        back = _from_end(place, h_kv, middle, longest, blocks, abreast, turns)
        total = 0
        for shared in range(KV_SHARE):
            group = (b % mask_batch) * mask_heads + (h_kv * KV_SHARE + shared) // (heads // mask_heads)
            total += gl.load(p_tiles + group * blocks + block)
        mbarrier.wait(kv_empty, turn ^ 1)
        write_word(item_s.index(0), total)
        write_word(item_s.index(1), block)
        write_word(item_s.index(2), bh)
        mbarrier.expect(kv_full, 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
        for w in gl.static_range(2):
            n0 = block * 128 + 64 * w
            tma.async_copy_global_to_shared(k_desc, [b, n0, h_kv, 0], kv_full, k_s.index(w))
            tma.async_copy_global_to_shared(v_desc, [b, n0, h_kv, 0], kv_full, v_s.index(w))
        turn = turn ^ 1
        for outer in range(KV_SHARE // together):
            h0 = h_kv * KV_SHARE + outer * together
            group = (b % mask_batch) * mask_heads + h0 // (heads // mask_heads)
            at = group * blocks + block
            run, tile, end, partial = open_walk(p_first, p_count, p_runs, at, back)
            for _ in range(gl.load(p_tiles + at)):
                for inner in range(together):
                    # fmt: off
                    stage, phase = _fetch(tile, partial, h0 + inner, group, stage, phase, q_desc, dout_desc, stats_desc,
                                          q_s, dout_s, stats_s, word_s, full, b, heads, row_blocks,
                                          BLOCK_M, STAGES)
                    # fmt: on
                word, word_end = peek_walk(p_runs, run, back)
                run, tile, end, partial = walk_on(run, tile, end, partial, word, word_end, back)
        item = take(p_counter)
    mbarrier.wait(kv_empty, turn ^ 1)
    # Whoever announced itself is met.
    for each in gl.static_range(STAGES):
        meet(STAGE_EMPTY + each, ALL)
    write_word(item_s.index(0), -1)
    mbarrier.arrive(kv_full, count=1)


@gluon.jit
def _product(a, b, BLOCK_M: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """a B^T, in flight: a `[64, D]` and b `[1, BLOCK_M, 1, D]` in shared memory."""
    blank = gl.full([64, BLOCK_M], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(a, b.reshape([BLOCK_M, D]).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def _query_gradient(
    w: gl.constexpr, first, second, k0, k1, BLOCK_M: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr
):
    """Warpgroup w's half of dS K, in flight: D / 2 of the columns of 64 rows, or 64 of 128 rows.

    first and second: `[64, BLOCK_M]` of dS^T in shared memory, one warpgroup's each; k0, k1: `[64, D]`, their columns.
    """
    blank = gl.full([64, 64], 0.0, gl.float32, LAYOUT)
    if BLOCK_M == 64:
        k0, k1 = k0.slice(w * (D // 2), D // 2, 1), k1.slice(w * (D // 2), D // 2, 1)
    else:
        first, second = first.slice(64 * w, 64, 1), second.slice(64 * w, 64, 1)
    dq = warpgroup_mma(first.permute((1, 0)), k0, blank, use_acc=False, is_async=True)
    return warpgroup_mma(second.permute((1, 0)), k1, dq, is_async=True)


@gluon.jit
def _consume(
    w: gl.constexpr,
    dq_desc,
    dk_desc,
    dv_desc,
    p_dk,
    p_dv,
    p_starts,
    p_ends,
    stride_db,
    stride_dn,
    stride_dh,
    q_s,
    k_s,
    v_s,
    dout_s,
    stats_s,
    ds_s,
    dq_s,
    word_s,
    item_s,
    kv_full,
    kv_empty,
    full,
    n_q,
    n_k,
    heads_kv,
    scale,
    BLOCK_M: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA_STORE: gl.constexpr,
    DQ: gl.constexpr,
    AHEAD: gl.constexpr,
):
    gl.static_assert(STAGES > 1 or not AHEAD, "the next tile has no buffer while this one's is in use")
    gl.static_assert(STAGES <= 4, "a stage divided by four is taken for zero")
    LOG2E: gl.constexpr = 1.4426950408889634
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, KV, 2)
    # The order of dQ in shared and in global memory is that in which threads hold it, four numbers each. A warp then
    # stores 512 bytes without a conflict; rows of a swizzled tile would meet in pairs. `scale_kernel` undoes it.
    HELD: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    )
    dtype: gl.constexpr = q_s.dtype
    scale_log2 = scale * LOG2E
    k = k_s.index(w).reshape([64, D])

    # All stages are empty.
    for each in gl.static_range(STAGES):
        announce(STAGE_EMPTY + each, ALL)
    stage, phase, turn, item_turn = 0, 0, 0, 0
    mbarrier.wait(kv_full, 0)
    tiles = read_word(item_s.index(0))
    while tiles >= 0:
        block = read_word(item_s.index(1))
        bh = read_word(item_s.index(2))
        b = bh // heads_kv
        n0 = block * 128 + 64 * w
        o_n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
        dk = gl.full([64, D], 0.0, gl.float32, KV)
        dv = gl.full([64, D], 0.0, gl.float32, KV)
        if AHEAD:
            mbarrier.wait(full.index(stage), phase, pred=tiles > 0)
            s = warpgroup_mma_wait(0, deps=(_product(k, q_s.index(stage), BLOCK_M, D, S),))
        for i in range(tiles):
            # Zero, which the compiler does not see: it would compute all addresses of K and V once, and spill them.
            zero = stage >> 2
            k = k_s.index(w + zero).reshape([64, D])
            v = v_s.index(w + zero).reshape([64, D])
            q = q_s.index(stage).reshape([BLOCK_M, D])
            dout = dout_s.index(stage).reshape([BLOCK_M, D])
            stats = stats_s.index(stage)
            if AHEAD:
                word = read_word(word_s.index(3 * stage))
                dp = _product(v, dout_s.index(stage), BLOCK_M, D, S)
            else:
                mbarrier.wait(full.index(stage), phase)
                word = read_word(word_s.index(3 * stage))
                s_now = _product(k, q_s.index(stage), BLOCK_M, D, S)
                dp = _product(v, dout_s.index(stage), BLOCK_M, D, S)
                s = warpgroup_mma_wait(1, deps=(s_now,))
            m0 = (word >> 1) * BLOCK_M
            if word & 1:
                first = read_word(word_s.index(3 * stage + 2)).to(gl.int64) * INTERVALS * n_k
                s = hide_columns(
                    s, o_n, m0, n0, n_q, n_k, p_starts + first, p_ends + first, BLOCK_M, S, CAUSAL, INTERVALS
                )
            p = gl.exp2(s * scale_log2 - stats.slice(0, 1, 0).load(S))
            # Before dS is formed, which hides it; and the wait for dP cannot move above the exponentials that hide dP.
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P), dout, dv, is_async=True)
            b_dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = (p * (b_dp - stats.slice(1, 1, 0).load(S))).to(dtype)
            read = stage
            if DQ:
                h = read_word(word_s.index(3 * stage + 1))
                # Two buffers in turn: whoever writes the one of two tiles ago has met the other warpgroup at the last
                # tile, hence when it was done with reading it.
                ds_s.index(2 * w + turn).store(ds)
                fence_async_shared()
                if AHEAD:
                    # Before the other warpgroup is waited for, which it hides.
                    dk = warpgroup_mma(gl.convert_layout(ds, P), q, dk, is_async=True)
                # The sum of the last tile has left its buffer: here one barrier of the warpgroup serves this too.
                tma.store_wait(0)
                meet(DS_FULL, CONSUMERS)
                k0, k1 = k_s.index(zero).reshape([64, D]), k_s.index(zero + 1).reshape([64, D])
                dq = _query_gradient(w, ds_s.index(turn), ds_s.index(2 + turn), k0, k1, BLOCK_M, D, HALF)
                turn = turn ^ 1
                stage, phase = next_stage(stage, phase, STAGES)
                if AHEAD:
                    dv, dk = warpgroup_mma_wait(2, deps=(dv, dk))
                    announce(STAGE_EMPTY + read, ALL)
                    # As below; and it runs while dQ leaves.
                    mbarrier.wait(full.index(stage), phase, pred=i + 1 < tiles)
                    s_next = _product(k, q_s.index(stage), BLOCK_M, D, S)
                    b_dq = warpgroup_mma_wait(1, deps=(dq,))
                else:
                    # Behind dQ, so that it runs while dQ leaves.
                    dk = warpgroup_mma(gl.convert_layout(ds, P), q, dk, is_async=True)
                    b_dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
                dq_s.index(w)._reinterpret(gl.float32, [64, 64], HELD).store(b_dq)
                fence_async_shared()
                dq_out = dq_s.index(w)._reinterpret(gl.float32, [1, 64, 1, 64], dq_desc.layout)
                if BLOCK_M == 64:
                    tma_reduce_add(dq_desc, [b, m0, h, w * (D // 2)], dq_out)
                else:
                    tma_reduce_add(dq_desc, [b, m0 + 64 * w, h, 0], dq_out)
                if not AHEAD:
                    dk = warpgroup_mma_wait(0, deps=(dk,))
                    announce(STAGE_EMPTY + read, ALL)
            else:
                dk = warpgroup_mma(gl.convert_layout(ds, P), q, dk, is_async=True)
                stage, phase = next_stage(stage, phase, STAGES)
                if AHEAD:
                    # After the list's last tile this is of whatever is there, and nobody looks at it.
                    mbarrier.wait(full.index(stage), phase, pred=i + 1 < tiles)
                    s_next = _product(k, q_s.index(stage), BLOCK_M, D, S)
                dv, dk = warpgroup_mma_wait(1 if AHEAD else 0, deps=(dv, dk))
                announce(STAGE_EMPTY + read, ALL)
            if AHEAD:
                s = warpgroup_mma_wait(0, deps=(s_next,))

        h_kv = bh - b * heads_kv
        if DQ:
            # K and V of the next item may come: dK and dV leave by the buffers of dQ and dS, once the other warpgroup
            # has read the latter.
            mbarrier.arrive(kv_empty, count=1)
            mbarrier.wait(kv_empty, item_turn)
        if TMA_STORE:
            tma.store_wait(0)
            dv_s = ds_s.index(2 * w) if DQ else v_s.index(w)
            dv_out = dv_s._reinterpret(dtype, [1, 64, 1, D], dv_desc.layout)
            dk_out = dq_s.index(w)._reinterpret(dtype, [1, 64, 1, D], dk_desc.layout)
            dv_out.reshape([64, D]).store(dv.to(dtype))
            dk_out.reshape([64, D]).store((dk * scale).to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(dv_desc, [b, n0, h_kv, 0], dv_out)
            tma.async_copy_shared_to_global(dk_desc, [b, n0, h_kv, 0], dk_out)
        else:
            o_row = gl.expand_dims(n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, KV)), 1)
            o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, KV)), 0)
            offsets = b.to(gl.int64) * stride_db + h_kv * stride_dh + o_row.to(gl.int64) * stride_dn + o_d
            gl.store(p_dv + offsets, dv, mask=o_row < n_k)
            gl.store(p_dk + offsets, dk * scale, mask=o_row < n_k)
        tma.store_wait(0)
        if not DQ:
            mbarrier.arrive(kv_empty, count=1)
        item_turn = item_turn ^ 1
        mbarrier.wait(kv_full, item_turn)
        tiles = read_word(item_s.index(0))


@gluon.jit(do_not_specialize=["abreast", "last", "turns"])
def backward_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    stats_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    p_dk,
    p_dv,
    p_starts,
    p_ends,
    p_runs,
    p_first,
    p_count,
    p_tiles,
    p_order,
    p_counter,
    stride_db,
    stride_dn,
    stride_dh,
    n_q,
    n_k,
    blocks,
    items,
    abreast,
    last,
    turns,
    heads,
    mask_batch,
    mask_heads,
    scale,
    KV_SHARE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA_STORE: gl.constexpr,
    DQ: gl.constexpr,
    ONE_LIST: gl.constexpr,
    AHEAD: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    HALVES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, D], q_desc.layout)
    dout_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, D], dout_desc.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BLOCK_M], stats_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, D], v_desc.layout)
    word_s = gl.allocate_shared_memory(gl.int32, [3 * STAGES, 1], WORD)
    item_s = gl.allocate_shared_memory(gl.int32, [3, 1], WORD)
    ds_s, dq_s = q_s, k_s
    if DQ:
        ds_s = gl.allocate_shared_memory(dtype, [4, 64, BLOCK_M], HALVES)
        # Half a tile of dQ each, at a list's end dK: that one is swizzled, and aligned as it must be.
        dq_s = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, 128], k_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    # Otherwise the compiler puts one before each of the first consumer's waits for what has been initialised here.
    thread_barrier()

    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (0, dq_desc, dk_desc, dv_desc, p_dk, p_dv, p_starts, p_ends, stride_db, stride_dn, stride_dh,
                        q_s, k_s, v_s, dout_s, stats_s, ds_s, dq_s, word_s, item_s, kv_full, kv_empty, full,
                        n_q, n_k, heads // KV_SHARE, scale,
                        BLOCK_M, D, STAGES, INTERVALS, CAUSAL, TMA_STORE, DQ, AHEAD)),
            (_consume, (1, dq_desc, dk_desc, dv_desc, p_dk, p_dv, p_starts, p_ends, stride_db, stride_dn, stride_dh,
                        q_s, k_s, v_s, dout_s, stats_s, ds_s, dq_s, word_s, item_s, kv_full, kv_empty, full,
                        n_q, n_k, heads // KV_SHARE, scale,
                        BLOCK_M, D, STAGES, INTERVALS, CAUSAL, TMA_STORE, DQ, AHEAD)),
            (_produce, (q_desc, k_desc, v_desc, dout_desc, stats_desc, q_s, k_s, v_s, dout_s, stats_s, word_s, item_s,
                        kv_full, kv_empty, full, p_runs, p_first, p_count, p_tiles, p_order, p_counter,
                        blocks, items, abreast, last, turns, n_q, heads, mask_batch, mask_heads,
                        KV_SHARE, BLOCK_M, STAGES, ONE_LIST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )
    # fmt: on
