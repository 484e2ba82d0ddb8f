"""Block shapes of the portable kernels, by architecture, element size and head dimension."""

from typing import NamedTuple


class Block(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    forward: Block
    query: Block
    """The dQ kernel."""
    key: Block
    """The dK, dV kernel."""


# 16-bit inputs. Keys: (architecture, padded head dimension). 90 at D 64 and 128: by time on an H100 over causal, packed
# causal documents and random eviction at 32K (benchmarks/blocks.py). The others by the compiler's resource report,
# unmeasured.
_HALF = {
    (80, 64): Blocks(Block(128, 64, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 8, 2)),
    (80, 128): Blocks(Block(128, 64, 8, 2), Block(64, 64, 4, 2), Block(32, 64, 8, 2)),
    (80, 256): Blocks(Block(32, 64, 4, 1), Block(32, 32, 4, 1), Block(32, 32, 8, 1)),
    (90, 64): Blocks(Block(128, 64, 4, 3), Block(64, 64, 4, 3), Block(32, 64, 4, 3)),
    (90, 128): Blocks(Block(128, 128, 8, 2), Block(128, 64, 8, 3), Block(64, 128, 8, 3)),
    (90, 256): Blocks(Block(128, 64, 8, 2), Block(64, 32, 8, 1), Block(32, 64, 8, 1)),
    (100, 64): Blocks(Block(128, 64, 8, 3), Block(64, 64, 4, 2), Block(32, 64, 4, 1)),
    (100, 128): Blocks(Block(128, 64, 8, 3), Block(128, 32, 8, 3), Block(32, 64, 4, 2)),
    (100, 256): Blocks(Block(64, 64, 8, 2), Block(64, 32, 8, 1), Block(32, 32, 8, 1)),
}
# The forward where columns have two intervals or more: their bounds would spill in the block above.
_FORWARD_OF_MANY = {(90, 128): Block(128, 64, 8, 3)}
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
    blocks = _HALF[architecture, padded]
    if intervals > 1:
        return blocks._replace(forward=_FORWARD_OF_MANY.get((architecture, padded), blocks.forward))
    return blocks
