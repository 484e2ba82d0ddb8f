"""The Hopper forward kernel, in Gluon: a TMA producer warp and two or three consumer warpgroups of 64 query rows each.

An item is the rows of all consumers, of one query head. A CTA takes one after the other, longest lists first: while the
consumers finish an item, the producer fetches Q, K and V of the next. It walks the item's runs of tiles, keeps STAGES
tiles of K and V in flight, fetches the columns' interval bounds along with K if a tile is partial, and tells the
consumers by a word in shared memory which tile that is. Each consumer issues S = Q K^T of tile j + 1 and O += P V of
tile j together and does the softmax of tile j + 1 while the tensor cores finish the latter. What a row's exponentials
are relative to is in most tiles not its maximum: `softmax` says why that is right for any input, and which items are
computed again.

Source: FlashAttention-3 (arXiv 2407.08608), algorithm 2 (overlap within a warpgroup), over FlashMask's visible tiles.
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
    hide_rows,
    next_tile,
    open_list,
    peek,
    place_of,
    read_word,
    scale_rows,
    take,
    tma_stores_land,
    write_word,
)
from fm_longctx.kernels.hopper.softmax import anchors, raise_anchors, softmax, sum_in_thread

# What the consumers are told of a tile: that it hides something; that no full tile was before it, so that there may be
# rows that have seen no column; that the item is computed once more, with maxima (see `softmax`).
PARTIAL = gl.constexpr(1)
OPENING = gl.constexpr(2)
AGAIN = gl.constexpr(4)


@gluon.jit
def _fetch(
    i,
    tile,
    flags,
    before,
    k_desc,
    v_desc,
    bounds_desc,
    k_s,
    v_s,
    bounds_s,
    word_s,
    full,
    empty,
    b,
    h_kv,
    bounds_row,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
):
    """Step i: K of its tile and V of the tile `before` it, which the consumers use together.

    flags, which they are told along with the tile: PARTIAL, OPENING, AGAIN.
    """
    stage = i % STAGES
    n0 = tile * BLOCK_N
    size: gl.constexpr = (k_desc.block_type.nbytes if K else 0) + (v_desc.block_type.nbytes if V else 0)
    mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
    if K:
        write_word(word_s.index(stage), tile << 3 | flags)
    if K and INTERVALS > 0:
        partial = flags & PARTIAL
        mbarrier.expect(full.index(stage), size + bounds_desc.block_type.nbytes, pred=partial != 0)
        mbarrier.expect(full.index(stage), size, pred=partial == 0)
        tma.async_copy_global_to_shared(
            bounds_desc, [bounds_row, n0], full.index(stage), bounds_s.index(stage), pred=partial != 0
        )
    else:
        mbarrier.expect(full.index(stage), size)
    if K:
        tma.async_copy_global_to_shared(k_desc, [b, n0, h_kv, 0], full.index(stage), k_s.index(stage))
    if V:
        tma.async_copy_global_to_shared(v_desc, [b, before * BLOCK_N, h_kv, 0], full.index(stage), v_s.index(stage))


@gluon.jit
def _produce(
    KV_SHARE: gl.constexpr,
    INTERVALS: gl.constexpr,
    STEADY: gl.constexpr,
    q_desc,
    k_desc,
    v_desc,
    bounds_desc,
    q_s,
    k_s,
    v_s,
    bounds_s,
    word_s,
    item_s,
    failed_s,
    q_full,
    q_empty,
    full,
    empty,
    p_runs,
    p_first,
    p_tiles,
    p_order,
    p_counter,
    blocks,
    items,
    abreast,
    last,
    heads,
    mask_batch,
    mask_heads,
):
    CONSUMERS: gl.constexpr = q_s.shape[0]
    STAGES: gl.constexpr = k_s.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[2]
    item = gl.program_id(0)
    # Items that may have to be computed again: those of the last turn and of the one before; -1 if none.
    newer, older = -1, -1
    turn, i = 0, 0
    while (item < items) | (newer >= 0) | (older >= 0):
        mbarrier.wait(q_empty, turn ^ 1)
        # The consumers have begun with the last turn's item, if not ended, and said how the one before it ended.
        again = 0
        if STEADY:  # noqa: SIM102 (known when compiled; the other is not)
            if older >= 0:
                ROWS: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
                for w in gl.static_range(CONSUMERS):
                    again |= gl.max(failed_s.index(CONSUMERS * turn + w).load(ROWS), 0)
        this = gl.where(again != 0, older, item)
        older = newer
        newer = -1
        # Where nothing is left but to hear how the last item ends: an item without tiles, of rows past the end.
        block, bh, b, h, group, at, count = blocks, 0, 0, 0, 0, 0, 0
        if this < items:
            place, bh = place_of(this, blocks, items // blocks, abreast, last)
            b = bh // heads
            h = bh - b * heads
            group = (b % mask_batch) * mask_heads + h // (heads // mask_heads)
            block = gl.load(p_order + group * blocks + place)
            at = group * blocks + block
            count = gl.load(p_tiles + at)
            if STEADY:
                newer = gl.where(again != 0, -1, this)
        if (this < items) | (older >= 0):
            write_word(item_s.index(0), count)
            write_word(item_s.index(1), block)
            write_word(item_s.index(2), bh)
            for w in gl.static_range(CONSUMERS):
                m_w = (block * CONSUMERS + w) * 64
                mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(q_desc, [b, m_w, h, 0], q_full.index(w), q_s.index(w))
            turn = turn ^ 1
        if count > 0:
            run, tile, end, partial = open_list(p_first, p_runs, at)
            h_kv = h // KV_SHARE
            bounds_row = group * bounds_desc.block_shape[0]
            flags = partial | OPENING | again * AGAIN
            # fmt: off
            _fetch(i, tile, flags, tile, k_desc, v_desc, bounds_desc, k_s, v_s, bounds_s, word_s, full, empty,
                   b, h_kv, bounds_row, BLOCK_N, STAGES, INTERVALS, K=True, V=False)
            for j in range(1, count):
                before = tile
                opening = flags & partial << 1
                word, word_end = peek(p_runs, run)
                run, tile, end, partial = next_tile(run, tile, end, partial, word, word_end)
                flags = partial | opening | again * AGAIN
                _fetch(i + j, tile, flags, before, k_desc, v_desc, bounds_desc, k_s, v_s, bounds_s, word_s, full,
                       empty, b, h_kv, bounds_row, BLOCK_N, STAGES, INTERVALS, K=True, V=True)
            _fetch(i + count, tile, flags, tile, k_desc, v_desc, bounds_desc, k_s, v_s, bounds_s, word_s, full,
                   empty, b, h_kv, bounds_row, BLOCK_N, STAGES, INTERVALS, K=False, V=True)
            # fmt: on
            i += count + 1
        if again == 0:
            item = take(p_counter)
    mbarrier.wait(q_empty, turn ^ 1)
    write_word(item_s.index(0), -1)
    for w in gl.static_range(CONSUMERS):
        mbarrier.arrive(q_full.index(w), count=1)


@gluon.jit
def _consume(
    w: gl.constexpr,
    INTERVALS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA_STORE: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    OUT_BUFFER: gl.constexpr,
    LAZY: gl.constexpr,
    STEADY: gl.constexpr,
    out_desc,
    p_out,
    p_lse,
    stride_ob,
    stride_on,
    stride_oh,
    q_s,
    out_s,
    k_s,
    v_s,
    bounds_s,
    word_s,
    item_s,
    failed_s,
    q_full,
    q_empty,
    full,
    empty,
    n_q,
    n_k,
    heads,
    scale,
):
    CONSUMERS: gl.constexpr = q_s.shape[0]
    STAGES: gl.constexpr = k_s.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[2]
    D: gl.constexpr = k_s.shape[4]
    D_V: gl.constexpr = v_s.shape[4]
    LOG2E: gl.constexpr = 1.4426950408889634
    LN2: gl.constexpr = 0.6931471805599453
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O)
    dtype: gl.constexpr = out_desc.dtype
    scale_log2 = scale * LOG2E
    blank = gl.full([64, BLOCK_N], 0.0, gl.float32, S)
    turn, i = 0, 0
    mbarrier.wait(q_full.index(w), 0)
    count = read_word(item_s.index(0))
    while count >= 0:
        block = read_word(item_s.index(1))
        bh = read_word(item_s.index(2))
        m_w = (block * CONSUMERS + w) * 64
        o_m = m_w + gl.arange(0, 64, layout=S_ROW)
        b_top = gl.full([64], float("-inf"), gl.float32, S_ROW)
        b_out = gl.full([64, D_V], 0.0, gl.float32, O)
        b_next = b_top
        split_sum = sum_in_thread(blank, 64, BLOCK_N)
        word = 3  # PARTIAL, OPENING
        if Q_IN_REGISTERS:
            # Read once instead of by every S = Q K^T: shared memory is what the products share with the copies.
            q = q_s.index(w).reshape([64, D]).load(gl.DotOperandLayout(0, S, 2))
            if OUT_BUFFER:
                mbarrier.arrive(q_empty, count=1)
        else:
            q = q_s.index(w).reshape([64, D])

        if count > 0:
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            k = k_s.index(stage).reshape([BLOCK_N, D])
            s = warpgroup_mma(q, k.permute((1, 0)), blank, use_acc=False, is_async=True)
            word = read_word(word_s.index(stage))
            s = warpgroup_mma_wait(0, deps=(s,))
            if word & PARTIAL:
                n0 = (word >> 3) * BLOCK_N
                s = hide_rows(s, o_m, m_w, n0, n_q, n_k, bounds_s.index(stage), BLOCK_N, S, CAUSAL, INTERVALS)
            mbarrier.arrive(empty.index(stage), count=1)
            b_next = anchors(s, b_top, scale_log2, STEADY, LAZY=False)
            p, split_sum, b_decay = softmax(s, b_top, b_next, split_sum, scale_log2, BLOCK_N)
            b_top = b_next
            p = gl.convert_layout(p.to(dtype), P)
            i += 1

            for _ in range(1, count):
                stage = i % STAGES
                phase = (i // STAGES) & 1
                mbarrier.wait(full.index(stage), phase)
                word = read_word(word_s.index(stage))
                k = k_s.index(stage).reshape([BLOCK_N, D])
                v = v_s.index(stage).reshape([BLOCK_N, D_V])
                s = warpgroup_mma(q, k.permute((1, 0)), blank, use_acc=False, is_async=True)
                token = warpgroup_mma(p, v, b_out, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                if word & (PARTIAL | OPENING | AGAIN if STEADY else PARTIAL):
                    if word & PARTIAL:
                        n0 = (word >> 3) * BLOCK_N
                        s = hide_rows(s, o_m, m_w, n0, n_q, n_k, bounds_s.index(stage), BLOCK_N, S, CAUSAL, INTERVALS)
                    if STEADY:  # noqa: SIM102
                        if word & (OPENING | AGAIN):
                            follow = (b_top == float("-inf")) | ((word & AGAIN) != 0)
                            b_next = gl.where(follow, anchors(s, b_next, scale_log2, STEADY, LAZY=False), b_next)
                if not STEADY:
                    b_next = anchors(s, b_top, scale_log2, STEADY, LAZY)
                p32, split_sum, b_decay = softmax(s, b_top, b_next, split_sum, scale_log2, BLOCK_N)
                b_top = b_next
                if STEADY:
                    # Here, not where it is used: an exchange between threads, which ptxas does not move over what ends
                    # a basic block, and so keeps all that it depends on before the wait for P V.
                    b_next = raise_anchors(b_top, split_sum, S_ROW)
                p16 = p32.to(dtype)
                # Long complete. But waiting is a loop, which ends the basic block, and that keeps ptxas from hoisting
                # the wait for P V above the softmax that is to hide it.
                mbarrier.wait(full.index(stage), phase)
                b_out = warpgroup_mma_wait(0, deps=(token,))
                mbarrier.arrive(empty.index(stage), count=1)
                if LAZY:
                    b_out = scale_rows(b_out, gl.convert_layout(b_decay, O_ROW))
                else:
                    b_out = b_out * gl.expand_dims(gl.convert_layout(b_decay, O_ROW), 1)
                p = gl.convert_layout(p16, P)
                i += 1

            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            v = v_s.index(stage).reshape([BLOCK_N, D_V])
            token = warpgroup_mma(p, v, b_out, is_async=True)
            b_out = warpgroup_mma_wait(0, deps=(token,))
            mbarrier.arrive(empty.index(stage), count=1)
            i += 1
        if OUT_BUFFER and not Q_IN_REGISTERS:
            mbarrier.arrive(q_empty, count=1)

        b_sum = gl.convert_layout(gl.sum(split_sum, 1), S_ROW)
        b_decay = gl.full([64], 1.0, gl.float32, S_ROW)
        if STEADY:
            # Not a number: the item is computed again.
            failed = gl.convert_layout(gl.sum(b_out * 0.0, 1), S_ROW) + b_sum * 0.0 != 0.0
            failed = failed | (b_next != b_next)
            if word & (PARTIAL | OPENING) != 3:
                # After a full tile a row without an anchor saw nothing but -inf there: later p may have vanished.
                failed = failed | (b_top == float("-inf"))
            failed_s.index(CONSUMERS * turn + w).store(failed.to(gl.int32))
            # As a hidden tile would do, for one may have been visited or not.
            rises = b_next > b_top
            b_decay = gl.where(rises, gl.exp2(b_top - b_next), 1.0)
            b_top = gl.where(rises, b_next, b_top)
            b_sum *= b_decay
        seen = b_sum > 0.0
        b_sum = gl.where(seen, b_sum, 1.0)
        b_out = b_out * gl.expand_dims(gl.convert_layout(b_decay * (1.0 / b_sum), O_ROW), 1)
        b_lse = gl.where(seen, b_top * LN2 + gl.log(b_sum), float("-inf"))
        gl.store(p_lse + bh.to(gl.uint64) * gl.cast(n_q, gl.uint32) + o_m, b_lse, mask=o_m < n_q)
        b = bh // heads
        h = bh - b * heads
        if TMA_STORE:
            # TMA clips at the last row. The output of the item before has left the buffer.
            out = out_s.index(w)._reinterpret(dtype, [1, 64, 1, D_V], out_desc.layout)
            if OUT_BUFFER:
                if STEADY:
                    # And is in place: this item may be one that failed before it, computed again.
                    tma_stores_land()
                tma.store_wait(0)
            out.reshape([64, D_V]).store(b_out.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [b, m_w, h, 0], out)
            if not OUT_BUFFER:
                tma.store_wait(0)
        else:
            p_rows = p_out + b.to(gl.int64) * stride_ob + h * stride_oh
            o_row = gl.expand_dims(m_w + gl.arange(0, 64, layout=O_ROW), 1)
            o_d = gl.expand_dims(gl.arange(0, D_V, layout=gl.SliceLayout(0, O)), 0)
            gl.store(p_rows + o_row.to(gl.int64) * stride_on + o_d, b_out, mask=o_row < n_q)
        if not OUT_BUFFER:
            mbarrier.arrive(q_empty, count=1)
        turn = turn ^ 1
        mbarrier.wait(q_full.index(w), turn)
        count = read_word(item_s.index(0))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["abreast", "last"])
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    bounds_desc,
    p_out,
    p_lse,
    p_runs,
    p_first,
    p_tiles,
    p_order,
    p_counter,
    stride_ob,
    stride_on,
    stride_oh,
    n_q,
    n_k,
    blocks,
    items,
    abreast,
    last,
    heads,
    mask_batch,
    mask_heads,
    scale,
    KV_SHARE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    D_V: gl.constexpr,
    STAGES: gl.constexpr,
    INTERVALS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TMA_STORE: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    OUT_BUFFER: gl.constexpr,
    LAZY: gl.constexpr,
    STEADY: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 64, 1, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, D_V], v_desc.layout)
    bounds_s = gl.allocate_shared_memory(gl.int32, [STAGES, bounds_desc.block_shape[0], BLOCK_N], bounds_desc.layout)
    out_s = q_s
    if OUT_BUFFER:
        out_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 64, 1, D], q_desc.layout)
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    word_s = gl.allocate_shared_memory(gl.int32, [STAGES, 1], WORD)
    item_s = gl.allocate_shared_memory(gl.int32, [3, 1], WORD)
    failed_s = gl.allocate_shared_memory(gl.int32, [2 * CONSUMERS, 64], WORD)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_empty, count=CONSUMERS)
    for w in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    # fmt: off
    # ruff: noqa: RUF005 (Triton knows no other way)
    common = (out_desc, p_out, p_lse, stride_ob, stride_on, stride_oh, q_s, out_s, k_s, v_s, bounds_s,
              word_s, item_s, failed_s, q_full, q_empty, full, empty, n_q, n_k, heads, scale)
    source = (q_desc, k_desc, v_desc, bounds_desc, q_s, k_s, v_s, bounds_s, word_s, item_s,
              failed_s, q_full, q_empty, full, empty, p_runs, p_first, p_tiles, p_order, p_counter,
              blocks, items, abreast, last, heads, mask_batch, mask_heads)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, INTERVALS, CAUSAL, TMA_STORE, Q_IN_REGISTERS, OUT_BUFFER, LAZY, STEADY) + common),
                (_consume, (1, INTERVALS, CAUSAL, TMA_STORE, Q_IN_REGISTERS, OUT_BUFFER, LAZY, STEADY) + common),
                (_produce, (KV_SHARE, INTERVALS, STEADY) + source),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, INTERVALS, CAUSAL, TMA_STORE, Q_IN_REGISTERS, OUT_BUFFER, LAZY, STEADY) + common),
                (_consume, (1, INTERVALS, CAUSAL, TMA_STORE, Q_IN_REGISTERS, OUT_BUFFER, LAZY, STEADY) + common),
                (_consume, (2, INTERVALS, CAUSAL, TMA_STORE, Q_IN_REGISTERS, OUT_BUFFER, LAZY, STEADY) + common),
                (_produce, (KV_SHARE, INTERVALS, STEADY) + source),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24],
        )
    # fmt: on
