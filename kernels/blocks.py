"""Block shapes of the portable kernels, by architecture, element size and head dimension."""

from typing import NamedTuple


class Block(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False
    """The loop fetches by TMA: compute capability 9.0 and later."""


class Blocks(NamedTuple):
    forward: Block
    query: Block
    """The dQ kernel."""
    key: Block
    """The dK, dV kernel."""


# 16-bit inputs. Keys: (architecture, padded head dimension). 90 at D 64 and 128: by time on an H100 over causal, packed
# causal documents, random eviction and a global sliding window at 32K (benchmarks/blocks.py). The others by the
# compiler's resource report, unmeasured.
_HALF = {
    (80, 64): Blocks(Block(128, 64, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 8, 2)),
    (80, 128): Blocks(Block(128, 64, 8, 2), Block(64, 64, 4, 2), Block(32, 64, 8, 2)),
    (80, 256): Blocks(Block(32, 64, 4, 1), Block(32, 32, 4, 1), Block(32, 32, 8, 1)),
    (90, 64): Blocks(Block(128, 64, 4, 3), Block(64, 64, 4, 2, True), Block(128, 64, 4, 2, True)),
    (90, 128): Blocks(Block(64, 64, 4, 3, True), Block(64, 64, 4, 2, True), Block(64, 64, 4, 2, True)),
    (90, 256): Blocks(Block(128, 64, 8, 2), Block(64, 32, 8, 1), Block(32, 64, 8, 1)),
    (100, 64): Blocks(Block(128, 64, 8, 3), Block(64, 64, 4, 2), Block(32, 64, 4, 1)),
    (100, 128): Blocks(Block(128, 64, 8, 3), Block(128, 32, 8, 3), Block(32, 64, 4, 2)),
    (100, 256): Blocks(Block(64, 64, 8, 2), Block(64, 32, 8, 1), Block(32, 32, 8, 1)),
}
# Masks without intervals, full and causal: almost all tiles are full, so that larger blocks waste nothing at the edges
# of documents and windows, and have no bounds to hold.
_HALF_WITHOUT_INTERVALS = {
    (90, 64): Blocks(Block(128, 64, 4, 3), Block(128, 64, 8, 4, True), Block(64, 64, 4, 2, True)),
    (90, 128): Blocks(Block(128, 128, 8, 3, True), Block(128, 64, 8, 4, True), Block(64, 128, 8, 4, True)),
}
# The forward where columns have three intervals or more: their bounds would spill in the block above. By report; with
# two it was measured to be as fast.
_FORWARD_OF_MANY = {(90, 64): Block(64, 64, 4, 3)}
# float32 products run on the plain arithmetic units; any architecture.
_FULL = {
    64: Blocks(Block(64, 32, 4, 2), Block(64, 32, 8, 1), Block(32, 32, 8, 1)),
    128: Blocks(Block(32, 32, 4, 2), Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
    256: Blocks(Block(32, 16, 4, 1), Block(16, 16, 4, 1), Block(16, 16, 4, 1)),
}
# Small, so that short test sequences have many tiles; the interpreter's cost is by the tile.
_INTERPRETED = Blocks(Block(32, 32, 1, 1), Block(32, 32, 1, 1), Block(32, 32, 1, 1))


def choose(capability: tuple[int, int] | None, element_size: int, head_dim: int, intervals: int) -> Blocks:
    """Blocks for a compute capability (None: interpreted), bytes an element, the larger of D and D_v, and intervals a
    column."""
    if capability is None:
        return _INTERPRETED
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if element_size == 4:
        return _FULL[padded]
    architecture = 100 if capability >= (10, 0) else 90 if capability >= (9, 0) else 80
    key = architecture, padded
    if intervals == 0:
        return _HALF_WITHOUT_INTERVALS.get(key, _HALF[key])
    if intervals > 2:
        return _HALF[key]._replace(forward=_FORWARD_OF_MANY.get(key, _HALF[key].forward))
    return _HALF[key]
