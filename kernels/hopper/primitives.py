"""Steps that the Hopper kernels share."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin


@gluon.jit
def hide_rows(
    s,
    o_m,
    m0,
    n0,
    n_q,
    n_k,
    bounds,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
    CAUSAL: gl.constexpr,
    INTERVALS: gl.constexpr,
):
    """Scores `[64, BLOCK_N]` with the masked ones -inf; o_m `[64]` row indices from m0 on, n0 the first column.

    bounds: in shared memory, rows of `TileRuns.bounds`; columns past the end hide all rows there.
    """
    LAST: gl.constexpr = 2147483647
    o_m = gl.expand_dims(o_m, 1)
    o_n = gl.expand_dims(n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # One select a condition: keeping a tile of booleans alive across them would spill.
    if INTERVALS == 0:
        if CAUSAL:
            s = gl.where(o_m >= gl.where(o_n < n_k, o_n - (n_k - n_q), LAST), s, float("-inf"))
        else:
            s = gl.where(o_n < n_k, s, float("-inf"))
    elif CAUSAL:  # noqa: SIM102 (known when compiled; the other is not)
        # Of the tiles that intervals touch few meet the diagonal, and whether one does is the same for all threads.
        if m0 < n0 + BLOCK_N - 1 - (n_k - n_q):
            s = gl.where(o_m >= o_n - (n_k - n_q), s, float("-inf"))
    for i in gl.static_range(INTERVALS):
        start = bounds.slice(2 * i, 1, 0).load(LAYOUT)
        left = bounds.slice(2 * i + 1, 1, 0).load(LAYOUT)
        s = gl.where((o_m >= start) & (left < LAST - o_m), float("-inf"), s)
    return s


@gluon.jit
def hide_columns(
    s,
    o_n,
    m0,
    n0,
    n_q,
    n_k,
    p_starts,
    p_ends,
    BLOCK_M: gl.constexpr,
    LAYOUT: gl.constexpr,
    CAUSAL: gl.constexpr,
    INTERVALS: gl.constexpr,
):
    """Transposed scores `[64, BLOCK_M]` with the masked ones -inf; o_n `[64]` column indices from n0 on.

    p_starts, p_ends: `[INTERVALS, n_k]` of this mask group. A thread needs two of each interval; after the first tile
    they come from the cache, and held in registers they would spill.
    """
    LAST: gl.constexpr = 2147483647
    o_m = gl.expand_dims(m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT)), 0)
    inside = o_n < n_k
    if INTERVALS == 0:
        if CAUSAL:
            o_first = gl.where(inside, o_n - (n_k - n_q), LAST)
            s = gl.where(o_m >= gl.expand_dims(o_first, 1), s, float("-inf"))
        else:
            s = gl.where(gl.expand_dims(inside, 1), s, float("-inf"))
    elif CAUSAL:  # noqa: SIM102 (known when compiled; the other is not)
        if m0 < n0 + 63 - (n_k - n_q):
            s = gl.where(o_m >= gl.expand_dims(o_n - (n_k - n_q), 1), s, float("-inf"))
    for i in gl.static_range(INTERVALS):
        # A column past the end hides all rows.
        start = gl.expand_dims(gl.load(p_starts + i * n_k + o_n, mask=inside, other=0), 1)
        end = gl.expand_dims(gl.load(p_ends + i * n_k + o_n, mask=inside, other=LAST), 1)
        s = gl.where((o_m >= start) & (o_m < end), float("-inf"), s)
    return s


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next buffer of a ring and the parity of its barriers: carried, since remainders take registers and time."""
    last = stage + 1 == STAGES
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def open_list(p_first, p_runs, at):
    """Begin to walk the tiles of block `at` (a flat index): its first run, that run's first tile, end and flag."""
    run = gl.load(p_first + at)
    word = gl.load(p_runs + 2 * run)
    return run, word >> 1, gl.load(p_runs + 2 * run + 1), word & 1


@gluon.jit
def peek(p_runs, run):
    """The run after this one, in flight. Read at every step, needed or not, and long before `next_tile` looks at it."""
    return gl.load(p_runs + 2 * run + 2), gl.load(p_runs + 2 * run + 3)


@gluon.jit
def next_tile(run, tile, end, partial, word, word_end):
    """One tile on; word and word_end: what `peek` read."""
    more = tile + 1 < end
    run = gl.where(more, run, run + 1)
    tile = gl.where(more, tile + 1, word >> 1)
    partial = gl.where(more, partial, word & 1)
    return run, tile, gl.where(more, end, word_end), partial


@gluon.jit
def open_end(p_first, p_count, p_runs, at):
    """As `open_list`, but from the end: the last run, its last tile, its first tile and flag."""
    run = gl.maximum(gl.load(p_first + at) + gl.load(p_count + at) - 1, 0)
    word = gl.load(p_runs + 2 * run)
    return run, gl.load(p_runs + 2 * run + 1) - 1, word >> 1, word & 1


@gluon.jit
def peek_back(p_runs, run):
    """The run before this one, in flight."""
    before = gl.maximum(run - 1, 0)
    return gl.load(p_runs + 2 * before), gl.load(p_runs + 2 * before + 1)


@gluon.jit
def tile_before(run, tile, begin, partial, word, word_end):
    """One tile back; word and word_end: what `peek_back` read."""
    more = tile > begin
    run = gl.where(more, run, run - 1)
    tile = gl.where(more, tile - 1, word_end - 1)
    partial = gl.where(more, partial, word & 1)
    return run, tile, gl.where(more, begin, word >> 1), partial


@gluon.jit
def place_of(item, blocks, heads, together, last):
    """Which list of which head (of all samples' heads) an item is: its place among the head's lists, longest first.

    `together` heads at a time, at each place all of them; the `last` heads are one such group (see `launch.last_heads`).
    Both divide what they divide: heads less last by together.
    """
    begin = (heads - last) * blocks
    ends = item >= begin
    first = gl.where(ends, heads - last, 0)
    width = gl.where(ends, last, together)
    rest = item - gl.where(ends, begin, 0)
    return rest // width % blocks, first + rest // (width * blocks) * width + rest % width


@gluon.jit
def take(p_counter):
    """The next item of a persistent kernel, of which every CTA has taken its program id first."""
    return gl.num_programs(0) + gl.atomic_add(p_counter, 1)


@gluon.jit
def write_word(slot, value):
    """From a producer warp to a slot `[1]` in shared memory.

    Its first thread writes, and arrives at the barrier after: whoever waits for that barrier sees the word.
    """
    slot.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def read_word(slot):
    """The word in a slot `[1]`, as a scalar."""
    return gl.max(slot.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@builtin
def tma_reduce_add(desc, coord, src, _semantic=None):
    """Add a tile in shared memory to global memory, as `tma.async_copy_shared_to_global` would store it.

    Gluon has the operation but no function for it; `tma.store_wait` waits for it too.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)
