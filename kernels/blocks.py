"""Block shapes of the portable kernels, by architecture, element size and head dimension."""

from typing import NamedTuple


class Block(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False
    """The loop fetches by TMA: compute capability 9.0 and later."""
    late: bool = False
    """A partial tile reads its columns' intervals after the first product, not ahead of it: they then occupy no
    registers while full tiles go by. Forward and dQ."""
    registers: int | None = None
    """The most that a thread may have, so that one more block fits an SM."""
    steady: bool = False
    """The forward does without maxima (`forward._walk`)."""


class Blocks(NamedTuple):
    forward: Block
    query: Block
    """The dQ kernel."""
    key: Block
    """The dK, dV kernel."""


# 16-bit inputs. Keys: (architecture, padded head dimension). By the compiler's resource report, unmeasured.
_HALF = {
    (80, 64): Blocks(Block(128, 64, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 8, 2)),
    (80, 128): Blocks(Block(128, 64, 8, 2), Block(64, 64, 4, 2), Block(32, 64, 8, 2)),
    (80, 256): Blocks(Block(32, 64, 4, 1), Block(32, 32, 4, 1), Block(32, 32, 8, 1)),
    (90, 256): Blocks(Block(128, 64, 8, 2), Block(64, 32, 8, 1), Block(32, 64, 8, 1)),
    (100, 64): Blocks(Block(128, 64, 8, 3), Block(64, 64, 4, 2), Block(32, 64, 4, 1)),
    (100, 128): Blocks(Block(128, 64, 8, 3), Block(128, 32, 8, 3), Block(32, 64, 4, 2)),
    (100, 256): Blocks(Block(64, 64, 8, 2), Block(64, 32, 8, 1), Block(32, 32, 8, 1)),
}
# Compute capability 9.0 at D up to 128: by time on an H100 (benchmarks/blocks.py, benchmarks/notes/portable.md). It
# depends on how long the lists of tiles are, of which the host knows what `_lists` says. Why a block is what it is:
# - 64 rows and 168 registers: three blocks an SM fill each other's waits, which at D 64 are half of the time.
# - 128 columns: fewer instructions a score than 64. 64x64: less is wasted at the edges of short documents.
# - 128 rows at D 128: half as much is asked of the L2 cache, which pays where lists are long.
# - late: all but D 128 with one interval and short lists, where random eviction, all of it partial tiles, loses 15%.
# Three intervals and more by report: what does not spill.
_HOPPER = {
    64: {
        "full": Blocks(
            Block(64, 128, 4, 2, True, registers=168),
            Block(128, 64, 8, 4, True, registers=128),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "causal": Blocks(
            Block(64, 128, 4, 2, True, registers=168),
            Block(128, 64, 8, 4, True, registers=128),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "one side": Blocks(
            Block(64, 128, 4, 2, True, late=True, registers=168),
            Block(64, 64, 4, 2, True, late=True),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "one": Blocks(
            Block(64, 128, 4, 2, True, late=True, registers=168),
            Block(64, 64, 4, 3, True, late=True),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "one, long": Blocks(
            Block(64, 128, 4, 2, True, late=True, registers=168),
            Block(64, 64, 4, 3, True, late=True),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "two": Blocks(
            Block(64, 64, 4, 4, True, late=True),
            Block(64, 64, 4, 3, True, late=True),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "two, long": Blocks(
            Block(64, 128, 4, 2, True, late=True, registers=168),
            Block(64, 64, 4, 3, True, late=True),
            Block(64, 64, 4, 2, True, registers=168),
        ),
        "more": Blocks(Block(64, 64, 4, 3), Block(64, 64, 4, 3, True, late=True), Block(64, 64, 4, 2, True)),
    },
    128: {
        "full": Blocks(Block(128, 128, 8, 3, True), Block(128, 64, 8, 4, True), Block(64, 128, 8, 3, True)),
        "causal": Blocks(Block(128, 128, 8, 3, True), Block(128, 64, 8, 4, True), Block(64, 128, 8, 3, True)),
        "one side": Blocks(
            Block(128, 128, 8, 3, True, late=True), Block(128, 64, 8, 3, True, late=True), Block(64, 128, 8, 3, True)
        ),
        "one": Blocks(Block(64, 64, 4, 3, True), Block(64, 64, 4, 2, True), Block(64, 64, 4, 2, True)),
        "one, long": Blocks(
            Block(128, 128, 8, 3, True, late=True), Block(128, 64, 8, 4, True, late=True), Block(64, 128, 8, 3, True)
        ),
        "two": Blocks(Block(64, 64, 4, 3, True, late=True), Block(64, 64, 4, 2, True), Block(64, 64, 4, 2, True)),
        "two, long": Blocks(
            Block(64, 64, 4, 3, True, late=True), Block(128, 64, 8, 4, True, late=True), Block(64, 128, 8, 3, True)
        ),
        "more": Blocks(Block(64, 64, 4, 3, True), Block(64, 64, 4, 2, True, late=True), Block(64, 64, 4, 2, True)),
    },
}
# Forward blocks without maxima, of the same GPUs in bfloat16, where they are faster; elsewhere those above. At D 64 one
# interval and a diagonal keep the maxima: windows gain 9%, but random eviction, all partial tiles, loses 14%. At D 128
# 64 rows, two blocks an SM, are now faster than 128 on long lists too, and bounds better read early.
_STEADY = {
    64: {
        kind: _HOPPER[64][kind].forward._replace(steady=True)
        for kind in ("full", "causal", "one side", "two", "two, long")
    },
    128: dict.fromkeys(
        ("causal", "one side", "one", "one, long", "two", "two, long"), Block(64, 64, 4, 3, True, steady=True)
    ),
}
# Tokens from which documents and windows are taken to be long, by head dimension: a tile of D 64 is half the work.
_LONG = {64: 32768, 128: 65536}
# float32 products run on the plain arithmetic units; any architecture.
_FULL = {
    64: Blocks(Block(64, 32, 4, 2), Block(64, 32, 8, 1), Block(32, 32, 8, 1)),
    128: Blocks(Block(32, 32, 4, 2), Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
    256: Blocks(Block(32, 16, 4, 1), Block(16, 16, 4, 1), Block(16, 16, 4, 1)),
}
# Small, so that short test sequences have many tiles; the interpreter's cost is by the tile.
_INTERPRETED = Blocks(Block(32, 32, 1, 1), Block(32, 32, 1, 1), Block(32, 32, 1, 1))


def choose(
    capability: tuple[int, int] | None,
    element_size: int,
    head_dim: int,
    intervals: int,
    causal: bool,
    columns: int,
    bfloat16: bool = True,
) -> Blocks:
    """Blocks for a compute capability (None: interpreted), bytes an element, the larger of D and D_v, and what is known
    of a mask without looking at its intervals: how many there are a column, the diagonal, the columns; and whether
    elements of 2 bytes are bfloat16: float16 has no room for what is far from its anchor, and keeps the maxima."""
    if capability is None:
        steady = bfloat16 and element_size == 2
        return _INTERPRETED._replace(forward=_INTERPRETED.forward._replace(steady=steady))
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if element_size == 4:
        return _FULL[padded]
    architecture = 100 if capability >= (10, 0) else 90 if capability >= (9, 0) else 80
    if architecture == 90 and padded in _HOPPER:
        lists = _lists(intervals, causal, columns >= _LONG[padded])
        blocks = _HOPPER[padded][lists]
        return blocks._replace(forward=_STEADY[padded].get(lists, blocks.forward)) if bfloat16 else blocks
    return _HALF[architecture, padded]


def _lists(intervals: int, causal: bool, long: bool) -> str:
    """A mask by how long its lists of tiles are likely to be: a key of `_HOPPER`."""
    if intervals == 0:
        return "causal" if causal else "full"
    if intervals == 1 and not causal:
        # One end of each column: a prefix, or causal as a rank sees it. Documents and windows take two.
        return "one side"
    if intervals > 2:
        return "more"
    return ("one" if intervals == 1 else "two") + (", long" if long else "")
