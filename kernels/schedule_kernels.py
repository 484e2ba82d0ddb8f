"""The kernels that build tile schedules: what is known of each column-block, each block's runs, and the blocks' order.

A tile's state is exact. Nearly all of them follow from the least and the greatest start and end of each interval in the
column-block (`glance`), and those that do not are counted, column by column (`counted`).

A schedule is one of KEYS, `(block_m, block_n, by_row)`. All of them are built by the same launches, and their blocks
are numbered through; see `fm_longctx.kernels.schedule` for what the table holds of each.
"""

import triton
import triton.language as tl

# One kernel for all lengths: ranks and batches differ in theirs.
SIZES = ("first_bound", "n_q", "n_k", "intervals", "bound_rows", "first_state", "stride_s", "groups", "numbers", "room")


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(
    p_starts,
    p_ends,
    p_table,
    p_temporary,
    first_bound,
    n_q,
    n_k,
    intervals,
    bound_rows,
    BOUNDS: tl.constexpr,
    PADDED_TO: tl.constexpr,
    UNIT: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Of each interval and UNIT columns: least and greatest start, least and greatest end, `[groups, K, 4, units]`.

    An interval that a column has not begins and ends at n_q, but for the greatest end, which it has no part in. If
    BOUNDS also the table that partial tiles read, see `TileRuns.bounds`.
    """
    LAST: tl.constexpr = 2147483647
    group = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    o_u = tl.program_id(1) * (SPAN // UNIT) + tl.arange(0, SPAN // UNIT)
    units, stride_b = (n_k + UNIT - 1) // UNIT, tl.maximum(n_k + PADDED_TO - 1, PADDED_TO) // PADDED_TO * PADDED_TO
    inside = o_n < n_k
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        # Runs taken from the pool: `runs_kernel` counts.
        tl.store(p_temporary.to(tl.pointer_type(tl.int64)), tl.cast(0, tl.int64))
    p_starts += group * intervals * n_k
    p_ends += group * intervals * n_k
    p_bounds = p_table + first_bound + group * bound_rows * stride_b
    p_summary = p_temporary + 4 + group * intervals * 4 * units
    for i in range(intervals):
        b_start = tl.load(p_starts + tl.cast(i, tl.int64) * n_k + o_n, mask=inside, other=0)
        b_end = tl.load(p_ends + tl.cast(i, tl.int64) * n_k + o_n, mask=inside, other=LAST)
        if BOUNDS:
            p_bound = p_bounds + tl.cast(2 * i, tl.int64) * stride_b + o_n
            tl.store(p_bound, b_start, mask=o_n < stride_b)
            tl.store(p_bound + stride_b, LAST - b_end, mask=o_n < stride_b)
        empty = b_start >= b_end
        b_start, b_end = tl.where(empty, n_q, b_start), tl.where(empty, n_q, b_end)
        p_unit = p_summary + tl.cast(4 * i, tl.int64) * units + o_u
        SHAPE: tl.constexpr = [SPAN // UNIT, UNIT]
        least_start = tl.min(tl.where(inside, b_start, LAST).reshape(SHAPE), 1)
        greatest_start = tl.max(tl.where(inside, b_start, 0).reshape(SHAPE), 1)
        least_end = tl.min(tl.where(inside, b_end, LAST).reshape(SHAPE), 1)
        greatest_end = tl.max(tl.where(inside & ~empty, b_end, 0).reshape(SHAPE), 1)
        tl.store(p_unit, least_start, mask=o_u < units)
        tl.store(p_unit + units, greatest_start, mask=o_u < units)
        tl.store(p_unit + 2 * units, least_end, mask=o_u < units)
        tl.store(p_unit + 3 * units, greatest_end, mask=o_u < units)
    if BOUNDS:
        for row in range(2 * intervals, bound_rows):
            tl.store(
                p_bounds + tl.cast(row, tl.int64) * stride_b + o_n, tl.zeros([SPAN], tl.int32), mask=o_n < stride_b
            )


@triton.jit(do_not_specialize=SIZES)
def runs_kernel(
    p_starts,
    p_ends,
    p_table,
    p_temporary,
    first_state,
    stride_s,
    n_q,
    n_k,
    intervals,
    groups,
    numbers,
    room,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PARTIAL: tl.constexpr,
    FULL: tl.constexpr,
):
    """The runs of every block of every schedule, a block at a time in each program."""
    p_states = (p_temporary + first_state).to(tl.pointer_type(tl.int8)) + tl.program_id(0).to(tl.int64) * stride_s
    programs, units = tl.num_programs(0), (n_k + UNIT - 1) // UNIT
    before = groups * 0
    for key in tl.static_range(len(KEYS)):
        blocks = (n_q + KEYS[key][0] - 1) // KEYS[key][0] if KEYS[key][2] else (n_k + KEYS[key][1] - 1) // KEYS[key][1]
        entries = groups * blocks
        stride = (entries + 3) // 4 * 4
        # The numbers of all schedules go round the programs.
        for entry in range((tl.program_id(0) + programs - before % programs) % programs, entries, programs):
            group = (entry // blocks).to(tl.int64)
            count, tiles, run = block_runs(
                p_starts + group * intervals * n_k,
                p_ends + group * intervals * n_k,
                p_temporary + 4 + group * intervals * 4 * units,
                p_states,
                p_table + 4 * tl.cast(numbers, tl.int64),
                p_temporary.to(tl.pointer_type(tl.int64)),
                entry % blocks,
                before + entry,
                numbers,
                n_q,
                n_k,
                intervals,
                units,
                room,
                KEYS[key][0],
                KEYS[key][1],
                KEYS[key][2],
                CAUSAL,
                UNIT,
                CHUNK,
                AT_ONCE,
                PARTIAL,
                FULL,
            )
            p_entry = p_table + 4 * before.to(tl.int64) + entry
            tl.store(p_entry, run)
            tl.store(p_entry + stride, count)
            tl.store(p_entry + 2 * stride, tiles)
        before += stride


@triton.jit
def block_runs(
    p_starts,
    p_ends,
    p_summary,
    p_states,
    p_runs,
    p_used,
    block,
    own,
    shared,
    n_q,
    n_k,
    intervals,
    units,
    room,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_ROW: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PARTIAL: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write the runs of one block: how many they are, their tiles, and which is the first.

    own: the run that is this block's alone. shared: the first one of the pool.
    """
    UNKNOWN: tl.constexpr = 3
    # Past these all tiles lie above the diagonal.
    begin, end = 0, (n_k + BLOCK_N - 1) // BLOCK_N if BY_ROW else (n_q + BLOCK_M - 1) // BLOCK_M
    if CAUSAL and BY_ROW:
        visible = tl.minimum(block * BLOCK_M + BLOCK_M, n_q) + (n_k - n_q)
        end = tl.minimum(end, (tl.maximum(visible, 0) + BLOCK_N - 1) // BLOCK_N)
    elif CAUSAL:
        # A multiple of 16: aligned loads.
        begin = tl.maximum(block * BLOCK_N - (n_k - n_q), 0) // BLOCK_M // 16 * 16

    # The block before may still be read.
    tl.debug_barrier()
    lowest, highest = tl.zeros([CHUNK], tl.int32) + end, tl.zeros([CHUNK], tl.int32)
    for c0 in range(begin, end, CHUNK):
        o = c0 + tl.arange(0, CHUNK)
        whole = UNKNOWN
        if not BY_ROW:
            # All rows as one tile first: most such are hidden altogether.
            bottom = tl.minimum((c0 + CHUNK) * BLOCK_M, n_q)
            whole = glance(
                p_summary, c0 * BLOCK_M, bottom, block, n_k, n_q, intervals, units, BLOCK_N, CAUSAL, UNIT, PARTIAL, FULL
            )
        state = tl.zeros([CHUNK], tl.int32) + whole
        if (whole != 0) & (whole != FULL):
            low, column = (block * BLOCK_M, o) if BY_ROW else (o * BLOCK_M, block)
            high = tl.minimum(low + BLOCK_M, n_q)
            state = glance(
                p_summary, low, high, column, n_k, n_q, intervals, units, BLOCK_N, CAUSAL, UNIT, PARTIAL, FULL
            )
            unknown = (o < end) & (state == UNKNOWN)
            at = tl.min(tl.where(unknown, o, end))
            while at < end:
                o_at = at + tl.arange(0, AT_ONCE)
                b_counted = counted(
                    p_starts, p_ends, block, o_at, n_q, n_k, intervals, BLOCK_M, BLOCK_N, BY_ROW, CAUSAL, PARTIAL, FULL
                )
                tl.store(p_states + o_at, b_counted.to(tl.int8), mask=o_at < end)
                at = tl.min(tl.where(unknown & (o >= at + AT_ONCE), o, end))
        tl.store(p_states + o, state.to(tl.int8), mask=(o < end) & (state != UNKNOWN))
        seen = (o < end) & (state != 0)
        lowest = tl.minimum(lowest, tl.where(seen, o, end))
        highest = tl.maximum(highest, tl.where(seen, o + 1, 0))
    tl.debug_barrier()
    # All others are hidden: few blocks see much of the sequence.
    begin, end = tl.min(lowest) // 16 * 16, tl.max(highest)

    begins, visited = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for c0 in range(begin, end, CHUNK):
        o = c0 + tl.arange(0, CHUNK)
        state, before = two_states(p_states, o, begin, end)
        begins += ((state != 0) & (state != before)).to(tl.int32)
        visited += (state != 0).to(tl.int32)
    count, tiles = tl.sum(begins), tl.sum(visited)

    run = own
    fits = count <= 1
    if count > 1:
        taken = tl.atomic_add(p_used, count.to(tl.int64))
        fits = shared + taken + count <= room
        if fits:
            run = (shared + taken).to(tl.int32)
    if fits:
        begun = 0
        # One tile past the end is looked at too: it closes the last run.
        for c0 in range(begin, end + 1, CHUNK):
            o = c0 + tl.arange(0, CHUNK)
            state, before = two_states(p_states, o, begin, end)
            starts = (state != 0) & (state != before)
            ends = (before != 0) & (state != before)
            so_far = begun + tl.cumsum(starts.to(tl.int32))
            p_run = p_runs + 2 * run.to(tl.int64)
            tl.store(p_run + 2 * (so_far - 1), (o << 1) | (state == PARTIAL).to(tl.int32), mask=starts)
            tl.store(p_run + 2 * (so_far - 1 - starts.to(tl.int32)) + 1, o, mask=ends)
            begun += tl.sum(starts.to(tl.int32))
    else:
        lowest, highest = tl.zeros([CHUNK], tl.int32) + end, tl.zeros([CHUNK], tl.int32)
        for c0 in range(begin, end, CHUNK):
            o = c0 + tl.arange(0, CHUNK)
            state, before = two_states(p_states, o, begin, end)
            lowest = tl.minimum(lowest, tl.where(state != 0, o, end))
            highest = tl.maximum(highest, tl.where(state != 0, o + 1, 0))
        count = 1
        tiles = tl.max(highest) - tl.min(lowest)
        p_run = p_runs + 2 * tl.cast(own, tl.int64)
        tl.store(p_run, tl.min(lowest) << 1 | 1)
        tl.store(p_run + 1, tl.max(highest))
    return count, tiles, run


@triton.jit
def two_states(p_states, o, begin, end):
    """Of tiles o and of those before them; 0 outside of `[begin, end)`."""
    state = tl.load(p_states + o, mask=o < end, other=0)
    return state, tl.load(p_states + o - 1, mask=(o > begin) & (o <= end), other=0)


@triton.jit
def glance(
    p_summary,
    low,
    high,
    column,
    n_k,
    n_q,
    intervals,
    units,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    FULL: tl.constexpr,
):
    """States of the tiles of rows `[low, high)` and column-blocks `column`; 3 if undecided.

    Hidden: one interval, or the diagonal, covers all rows of all columns. Untouched: none can reach into it. Partial:
    exactly one can, not covering all, and it does hide a score: the column that begins first ends late enough, or the
    one that ends last begins early enough.
    """
    LAST: tl.constexpr = 2147483647
    UNKNOWN: tl.constexpr = 3
    touches = (low + column) * 0
    hidden, hides = touches != 0, touches != 0
    for i in range(intervals):
        least_start, greatest_start, least_end, greatest_end = LAST, 0, LAST, 0
        for u in tl.static_range(BLOCK_N // UNIT):
            unit = column * (BLOCK_N // UNIT) + u
            p_unit = p_summary + tl.cast(4 * i, tl.int64) * units + unit
            exists = unit < units
            least_start = tl.minimum(least_start, tl.load(p_unit, mask=exists, other=LAST))
            greatest_start = tl.maximum(greatest_start, tl.load(p_unit + units, mask=exists, other=0))
            least_end = tl.minimum(least_end, tl.load(p_unit + 2 * units, mask=exists, other=LAST))
            greatest_end = tl.maximum(greatest_end, tl.load(p_unit + 3 * units, mask=exists, other=0))
        touches += ((least_start < high) & (greatest_end > low)).to(tl.int32)
        hidden = hidden | ((greatest_start <= low) & (least_end >= high))
        hides = hides | ((least_start < high) & (least_end > low)) | ((greatest_end > low) & (greatest_start < high))
    first = column * BLOCK_N
    if CAUSAL:
        last = tl.minimum(first + BLOCK_N, n_k) - 1 - (n_k - n_q)
        touches += (last > low).to(tl.int32)
        hidden = hidden | (first - (n_k - n_q) >= high)
        hides = hides | (last > low)
    # A kernel has to look at the end of the columns: only in partial tiles it does.
    untouched = tl.where(first + BLOCK_N <= n_k, FULL, PARTIAL)
    return tl.where(
        hidden,
        0,
        tl.where(touches == 0, untouched, tl.where((touches == 1) & hides, PARTIAL, UNKNOWN)),
    )


@triton.jit
def counted(
    p_starts,
    p_ends,
    block,
    o,
    n_q,
    n_k,
    intervals,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_ROW: tl.constexpr,
    CAUSAL: tl.constexpr,
    PARTIAL: tl.constexpr,
    FULL: tl.constexpr,
):
    """States of tiles as `glance`, by counting the masked scores of each of their columns.

    Canonical intervals overlap neither each other nor what lies above the diagonal, so their shares add up.
    """
    row, column = (block, o[:, None]) if BY_ROW else (o[:, None], block)
    low = row * BLOCK_M
    high = tl.minimum(low + BLOCK_M, n_q)
    o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = o_n < n_k
    masked = (low + o_n) * 0
    size = masked + tl.where(inside, high - low, 0)
    for i in range(intervals):
        b_start = tl.load(p_starts + tl.cast(i, tl.int64) * n_k + o_n, mask=inside, other=0)
        b_end = tl.load(p_ends + tl.cast(i, tl.int64) * n_k + o_n, mask=inside, other=0)
        masked += tl.maximum(tl.minimum(b_end, high) - tl.maximum(b_start, low), 0)
    if CAUSAL:
        masked += tl.where(inside, tl.maximum(tl.minimum(o_n - (n_k - n_q), high) - low, 0), 0)
    masked, size = tl.sum(masked, 1), tl.sum(size, 1)
    whole = ((o if BY_ROW else block) + 1) * BLOCK_N <= n_k
    return tl.where(masked == size, 0, tl.where((masked == 0) & whole, FULL, PARTIAL))


@triton.jit(do_not_specialize=SIZES)
def order_kernel(
    p_table,
    n_q,
    n_k,
    groups,
    KEYS: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The place of OWN blocks: how many have more tiles, or come before and have as many."""
    group = tl.program_id(0) % groups
    o = tl.program_id(1) * OWN + tl.arange(0, OWN)
    before = groups * 0
    for key in tl.static_range(len(KEYS)):
        blocks = (n_q + KEYS[key][0] - 1) // KEYS[key][0] if KEYS[key][2] else (n_k + KEYS[key][1] - 1) // KEYS[key][1]
        stride = (groups * blocks + 3) // 4 * 4
        # The longest schedule decides how many programs there are; some of another's have nothing to place.
        if (tl.program_id(0) // groups == key) & (tl.program_id(1) * OWN < blocks):
            p_tiles = p_table + 4 * before.to(tl.int64) + 2 * stride + group * blocks
            tiles = tl.load(p_tiles + o, mask=o < blocks, other=-1)
            ahead = tl.zeros([OWN, CHUNK], tl.int32)
            for c0 in range(0, blocks, CHUNK):
                o_c = c0 + tl.arange(0, CHUNK)
                others = tl.load(p_tiles + o_c, mask=o_c < blocks, other=-1)[None, :]
                earlier = (others == tiles[:, None]) & (o_c[None, :] < o[:, None])
                ahead += ((others > tiles[:, None]) | earlier).to(tl.int32)
            tl.store(p_tiles + stride + tl.sum(ahead, 1), o, mask=o < blocks)
        before += stride
