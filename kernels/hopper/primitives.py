"""Steps that the Hopper kernels share."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.language import core


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
    # Of its columns a thread holds 2 l and 2 l + 1 of every eight. With 2 l on the rows' side the other is a constant.
    o_n = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    o_l, o_n = o_n & 6, o_n & (BLOCK_N - 7)
    # One select a condition: keeping a tile of booleans alive across them would spill.
    if CAUSAL:
        # Of the tiles that intervals touch few meet the diagonal, and whether one does is the same for all threads.
        # Rows that exist see no column past the end.
        if INTERVALS == 0 or m0 < n0 + BLOCK_N - 1 - (n_k - n_q):
            s = gl.where(o_m - (n0 - (n_k - n_q)) - o_l >= o_n, s, float("-inf"))
    elif INTERVALS == 0:
        s = gl.where(n_k - n0 - o_l > o_n, s, float("-inf"))
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
def open_walk(p_first, p_count, p_runs, at, back):
    """As `open_list`, from the list's end if `back`: a run, its first tile, last tile (as walked) and flag."""
    run = gl.load(p_first + at)
    run += gl.where(back, gl.maximum(gl.load(p_count + at) - 1, 0), 0)
    word = gl.load(p_runs + 2 * run)
    last = gl.load(p_runs + 2 * run + 1) - 1
    return run, gl.where(back, last, word >> 1), gl.where(back, word >> 1, last), word & 1


@gluon.jit
def peek_walk(p_runs, run, back):
    """The run after this one in the order of the walk, in flight."""
    run = gl.where(back, gl.maximum(run - 1, 0), run + 1)
    return gl.load(p_runs + 2 * run), gl.load(p_runs + 2 * run + 1)


@gluon.jit
def walk_on(run, tile, last, partial, word, word_end, back):
    """One tile on; word and word_end: what `peek_walk` read."""
    more = tile != last
    step = gl.where(back, -1, 1)
    run = gl.where(more, run, run + step)
    tile = gl.where(more, tile + step, gl.where(back, word_end - 1, word >> 1))
    last = gl.where(more, last, gl.where(back, word >> 1, word_end - 1))
    return run, tile, last, gl.where(more, partial, word & 1)


@gluon.jit
def place_of(item, blocks, heads, abreast, last):
    """Whose list an item of a persistent kernel is: its place among the head's lists (longest first), and the head.

    heads: of all samples. They are walked `abreast` at a time, at each place all of them, and the `last` ones, fewer or
    as many, by themselves: `launch.rounds` says why.
    """
    begin = (heads - last) * blocks
    first, width, rest = 0, abreast, item
    if item >= begin:
        first, width, rest = heads - last, last, item - begin
    return rest // width % blocks, first + rest // (width * blocks) * width + rest % width


@gluon.jit
def round_of(place, head, blocks, abreast, turns):
    """The round in which a list begins, counted within its sample, if `abreast` heads take `turns` of them."""
    return head // abreast * turns + place * turns // blocks


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


# Of all threads of a warpgroup: its name in Triton 3.6, and in 3.7.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@builtin
def meet(which, threads, _semantic=None):
    """Wait at a named barrier until so many threads have come, those counted that `announce` themselves."""
    _named_barrier("sync", which, threads, _semantic)


@builtin
def announce(which, threads, _semantic=None):
    """Come to a named barrier, but do not wait for the others.

    What these threads read before is read, and what they wrote is written, for whoever meets there.
    """
    _named_barrier("arrive", which, threads, _semantic)


def _named_barrier(step, which, threads, _semantic):
    """Gluon has mbarriers only, and has one thread arrive there for all: this one counts warps as they come."""
    asm = f"{{\n    bar.{step} $1, {core._unwrap_if_constexpr(threads)};\n    mov.u32 $0, 0;\n}}"
    which = _semantic.to_tensor(which)
    core.inline_asm_elementwise(asm, "=r,r", [which], core.int32, is_pure=False, pack=1, _semantic=_semantic)


@builtin
def tma_reduce_add(desc, coord, src, _semantic=None):
    """Add a tile in shared memory to global memory, as `tma.async_copy_shared_to_global` would store it.

    Gluon has the operation but no function for it; `tma.store_wait` waits for it too.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@builtin
def tma_stores_land(_semantic=None):
    """Wait until what this thread stored by TMA is in global memory; `tma.store_wait` waits for the source to be read.

    Two stores to the same rows are otherwise in no order.
    """
    asm = "{\n    cp.async.bulk.wait_group 0;\n    mov.u32 $0, $1;\n}"
    zero = _semantic.to_tensor(0)
    core.inline_asm_elementwise(asm, "=r,r", [zero], core.int32, is_pure=False, pack=1, _semantic=_semantic)


class _Tuples:
    """A code generator that calls a function with each argument's `pack` elements as one tuple."""

    def __init__(self, generator, pack):
        self.generator, self.pack = generator, pack

    def call_JitFunction(self, function, elements, kwargs):
        tuples = [core.tuple(elements[i : i + self.pack]) for i in range(0, len(elements), self.pack)]
        return self.generator.call_JitFunction(function, tuples, kwargs)


@builtin
def map_threads(function, *args, pack, _semantic=None, _generator=None):
    """function of what a thread holds of each tensor, as a tuple of `pack` elements; it may branch, each thread for
    itself.

    `map_elementwise` can do that, but would have the function name every element.
    """
    pack = core._unwrap_if_constexpr(pack)
    generator = _Tuples(_generator, pack)
    return core.map_elementwise(function, *args, pack=pack, _semantic=_semantic, _generator=generator)[0]


@gluon.jit
def _times_if_not_one(x, factor):
    changes = factor[0] != 1.0
    for i in gl.static_range(1, len(factor)):
        changes = changes | (factor[i] != 1.0)
    if changes:
        product = (x[0] * factor[0],)
        for i in gl.static_range(1, len(factor)):
            product = product + (x[i] * factor[i],)  # noqa: RUF005 (Triton knows no other way)
        x = product
    return x


@gluon.jit
def scale_rows(x, factor):
    """x `[64, D]` of one warpgroup times factor `[64]`, row by row; a thread whose rows' factors are all 1 skips it."""
    D: gl.constexpr = x.shape[1]
    return map_threads(_times_if_not_one, x, gl.expand_dims(factor, 1), pack=64 * D // 128)
