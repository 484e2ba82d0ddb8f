"""The tile schedule: which tiles a kernel visits, as runs of equal tiles, by row-block or by column-block.

Two kernels build it from the columns' intervals, without a host sync: the first counts the masked scores of each tile
exactly (so a tile that several intervals and the diagonal fill only jointly is skipped), the second compresses each
block's states into runs. `fm_longctx.mask.tiles` does the first in plain torch, by another method: the oracle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_longctx.mask import FlashMask
from fm_longctx.mask.tiles import FULL, PARTIAL

# States of tiles that exist at once while a schedule is built, one byte each.
_MAX_STATES = 1 << 24
_BLOCKS_AT_ONCE = 32
_LARGEST_TILE = 128
_CHUNK = 1024


class TileRuns(NamedTuple):
    """Per block (of rows, or of columns) the tiles to visit, ascending, as runs that are all partial or all full.

    With n blocks, group g = b * H_mask + h and block i::

        run = first[g, i]
        for r in range(run, run + run_count[g, i]):
            for other_block in range(runs[r, 0] >> 1, runs[r, 1]): visit it; it is partial if runs[r, 0] & 1

    A kernel need look neither at the mask nor at the sequence's end in a full tile: the last column-block is always
    partial if it is ragged. Only rows past the end remain, which every kernel can do harmlessly.

    Memory: 8 bytes a run. Any mask of up to 2^20 tiles and, beyond that, any of up to 2^20 runs and 32 a block on
    average is exact. If it needs more, the blocks that found no room visit everything between their first and last
    tile as partial: slower, and the same result bit for bit.
    """

    runs: Tensor
    """int32 `[room, 2]`: first tile << 1 | partial, and the tile after the last."""
    first: Tensor
    """int32 `[B * H_mask, n]`: the block's first run."""
    run_count: Tensor
    """int32 `[B * H_mask, n]`: the number of its runs."""
    tiles: Tensor
    """int32 `[B * H_mask, n]`: the number of tiles to visit."""
    order: Tensor
    """int32 `[B * H_mask, n]`: the blocks, most tiles first, so that the last to run are short."""
    bounds: Tensor
    """What partial tiles read, the same for all schedules of a mask: see `hidden_rows`."""


def tile_runs(mask: FlashMask, block_m: int, block_n: int, *, by_row: bool) -> TileRuns:
    """Runs of `[block_m, block_n]` tiles that are not skipped, cached on the mask. Never waits for the device.

    `by_row` lists the column-blocks of each row-block (forward, dQ); otherwise the row-blocks of each column-block
    (dK, dV).
    """
    key = (TileRuns, block_m, block_n, by_row)
    if key not in mask.cache:
        # The operator is what torch.compile can trace; otherwise its dispatch would take as long as the kernels.
        build = _build_traced if torch.compiler.is_compiling() else _build
        runs, first, run_count, tiles, order = build(
            mask.starts, mask.ends, mask.num_rows, mask.causal, block_m, block_n, by_row
        )
        mask.cache[key] = TileRuns(runs, first, run_count, tiles, order, hidden_rows(mask))
    return mask.cache[key]


def hidden_rows(mask: FlashMask) -> Tensor:
    """The intervals as the attention kernels read them, cached on the mask: int32 `[B * H_mask, R, N_k rounded up]`.

    Rows 2 i and 2 i + 1 hold interval i: its start, and 2^31 - 1 less its end. So the zeros past the last column, also
    those that TMA fills in, are the interval that hides every row. R is a power of two, at least 2, as TMA's boxes are;
    N_k is rounded up to a multiple of the largest tile, so that no read needs a predicate.
    """
    if "bounds" not in mask.cache:
        intervals, columns = mask.num_intervals, mask.num_columns
        rows = max(2, triton.next_power_of_2(2 * intervals))
        shape = (mask.batch, mask.heads, rows, max(1, -(-columns // _LARGEST_TILE)) * _LARGEST_TILE)
        bounds = torch.zeros(shape, dtype=torch.int32, device=mask.device)
        bounds[:, :, 0 : 2 * intervals : 2, :columns] = mask.starts
        bounds[:, :, 1 : 2 * intervals : 2, :columns] = torch.iinfo(torch.int32).max - mask.ends
        mask.cache["bounds"] = bounds.flatten(0, 1)
    return mask.cache["bounds"]


def _build(
    starts: Tensor, ends: Tensor, num_rows: int, causal: bool, block_m: int, block_n: int, by_row: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    intervals, n_k = starts.shape[2:]
    groups, blocks, others, room = _sizes(starts, num_rows, block_m, block_n, by_row)
    runs = starts.new_empty((room, 2))
    first, count, tiles = (starts.new_empty((groups, blocks)) for _ in range(3))
    used = torch.zeros(1, dtype=torch.int64, device=starts.device)
    strip = max(1, min(blocks, _MAX_STATES // max(1, groups * others)))
    states = torch.empty((groups, strip, others), dtype=torch.int8, device=starts.device)
    for begin in range(0, blocks if others else 0, strip):
        size = min(strip, blocks - begin)
        # The kernel counts a few row-blocks at once for one column-block.
        rows, columns = (size, others) if by_row else (others, size)
        first_row, first_column = (begin, 0) if by_row else (0, begin)
        stride_r, stride_c = (others, 1) if by_row else (1, others)
        with torch.cuda.device_of(starts):
            tile_states_kernel[(columns, triton.cdiv(rows, _BLOCKS_AT_ONCE), groups)](
                starts,
                ends,
                states,
                first_row,
                first_column,
                rows,
                stride_r,
                stride_c,
                strip * others,
                num_rows,
                n_k,
                intervals,
                CAUSAL=causal,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCKS=_BLOCKS_AT_ONCE,
                PARTIAL=PARTIAL,
                FULL=FULL,
            )
            tile_runs_kernel[(size, groups)](
                states,
                runs,
                first,
                count,
                tiles,
                used,
                begin,
                blocks,
                others,
                strip * others,
                room - 1,
                CHUNK=min(_CHUNK, triton.next_power_of_2(others + 1)),
                PARTIAL=PARTIAL,
            )
    if not others:
        count.zero_()
        tiles.zero_()
    # A stable sort, so that the order of the launches is a function of the mask alone.
    order = tiles.sort(dim=1, descending=True, stable=True).indices.int()
    return runs, first, count, tiles, order


_build_traced = torch.library.custom_op("fm_longctx::tile_runs", _build, mutates_args=())


@_build_traced.register_fake
def _(
    starts: Tensor, ends: Tensor, num_rows: int, causal: bool, block_m: int, block_n: int, by_row: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, blocks, _, room = _sizes(starts, num_rows, block_m, block_n, by_row)
    first, count, tiles, order = (starts.new_empty((groups, blocks)) for _ in range(4))
    return starts.new_empty((room, 2)), first, count, tiles, order


def _sizes(starts: Tensor, num_rows: int, block_m: int, block_n: int, by_row: bool) -> tuple[int, int, int, int]:
    """Groups, blocks, tiles a block, and runs that there is room for."""
    groups = starts.shape[0] * starts.shape[1]
    blocks, others = -(-num_rows // block_m), -(-starts.shape[3] // block_n)
    if not by_row:
        blocks, others = others, blocks
    shared = min(groups * blocks * others, (1 << 20) + 32 * groups * blocks)
    # One run of its own for each block, which is all that most need; one to spare, because walks read one run ahead.
    return groups, blocks, others, groups * blocks + shared + 1


@triton.jit
def tile_states_kernel(
    p_starts,
    p_ends,
    p_states,
    first_row,
    first_column,
    rows,
    stride_r,
    stride_c,
    stride_g,
    n_q,
    n_k,
    intervals,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTIAL: tl.constexpr,
    FULL: tl.constexpr,
):
    """States of the tiles of one column-block and BLOCKS of the `rows` row-blocks from `first_row` on."""
    group = tl.program_id(2).to(tl.int64)
    column = first_column + tl.program_id(0)
    o_r = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    o_n = (column * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    width = tl.minimum(n_k - column * BLOCK_N, BLOCK_N)
    p_starts += group * intervals * n_k
    p_ends += group * intervals * n_k
    untouched = tl.where(width == BLOCK_N, FULL, PARTIAL)

    # All row-blocks as one tile first: most such tiles are untouched or hidden altogether, and so are their parts.
    top = ((first_row + tl.program_id(1) * BLOCKS) * BLOCK_M + tl.zeros([1], tl.int32))[:, None]
    bottom = tl.minimum(top + BLOCKS * BLOCK_M, n_q)
    count = tl.sum(masked_rows(p_starts, p_ends, o_n, top, bottom, n_q, n_k, intervals, CAUSAL).to(tl.int64))
    if count == 0:
        state = untouched + tl.zeros([BLOCKS], tl.int32)
    elif count == tl.sum((bottom - top).to(tl.int64) * width):
        state = tl.zeros([BLOCKS], tl.int32)
    else:
        low = ((first_row + o_r) * BLOCK_M)[:, None]
        high = tl.minimum(low + BLOCK_M, n_q)
        masked = tl.sum(masked_rows(p_starts, p_ends, o_n, low, high, n_q, n_k, intervals, CAUSAL), 1)
        size = tl.sum((high - low) * width, 1)
        state = tl.where(masked == size, 0, tl.where(masked == 0, untouched, PARTIAL))
    p_tile = p_states + group * stride_g + o_r * stride_r + tl.program_id(0) * stride_c
    tl.store(p_tile, state.to(tl.int8), mask=o_r < rows)


@triton.jit
def masked_rows(p_starts, p_ends, o_n, low, high, n_q, n_k, intervals, CAUSAL: tl.constexpr):
    """How many of the rows `[low, high)` each column hides: `[blocks, BN]`, for low and high `[blocks, 1]`.

    Canonical intervals overlap neither each other nor what lies above the diagonal, so their shares add up.
    """
    inside = o_n < n_k
    masked = tl.zeros([low.shape[0], o_n.shape[1]], tl.int32)
    for i in range(intervals):
        b_start = tl.load(p_starts + i * n_k + o_n, mask=inside, other=0)
        b_end = tl.load(p_ends + i * n_k + o_n, mask=inside, other=0)
        masked += tl.maximum(tl.minimum(b_end, high) - tl.maximum(b_start, low), 0)
    if CAUSAL:
        masked += tl.where(inside, tl.maximum(tl.minimum(o_n - (n_k - n_q), high) - low, 0), 0)
    return masked


@triton.jit
def tile_runs_kernel(
    p_states,
    p_runs,
    p_first,
    p_count,
    p_tiles,
    p_used,
    first_block,
    blocks,
    others,
    stride_g,
    room,
    CHUNK: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Runs of one block, from the states of its tiles `[others]`."""
    group = tl.program_id(1)
    block = group * blocks + first_block + tl.program_id(0)
    p_states += group.to(tl.int64) * stride_g + tl.program_id(0) * others
    count, tiles, lowest, highest = 0, 0, others, 0
    for c0 in range(0, others, CHUNK):
        o = c0 + tl.arange(0, CHUNK)
        state = tl.load(p_states + o, mask=o < others, other=0)
        before = tl.load(p_states + o - 1, mask=(o > 0) & (o <= others), other=0)
        count += tl.sum(((state != 0) & (state != before)).to(tl.int32))
        tiles += tl.sum((state != 0).to(tl.int32))
        lowest = tl.minimum(lowest, tl.min(tl.where(state != 0, o, others)))
        highest = tl.maximum(highest, tl.max(tl.where(state != 0, o + 1, 0)))

    shared = tl.num_programs(1) * blocks
    run = block
    fits = count <= 1
    if count > 1:
        taken = tl.atomic_add(p_used, tl.cast(count, tl.int64))
        fits = shared + taken + count <= room
        if fits:
            run = (shared + taken).to(tl.int32)
    if not fits:
        count = 1
        tiles = highest - lowest
        tl.store(p_runs + 2 * run, lowest << 1 | 1)
        tl.store(p_runs + 2 * run + 1, highest)
    tl.store(p_first + block, run)
    tl.store(p_count + block, count)
    tl.store(p_tiles + block, tiles)
    if fits:
        begun = 0
        # One tile past the end is looked at too: it closes the last run.
        for c0 in range(0, others + 1, CHUNK):
            o = c0 + tl.arange(0, CHUNK)
            state = tl.load(p_states + o, mask=o < others, other=0)
            before = tl.load(p_states + o - 1, mask=(o > 0) & (o <= others), other=0)
            begins = (state != 0) & (state != before)
            ends = (before != 0) & (state != before)
            so_far = begun + tl.cumsum(begins.to(tl.int32))
            p_run = p_runs + 2 * run.to(tl.int64)
            tl.store(p_run + 2 * (so_far - 1), (o << 1) | (state == PARTIAL).to(tl.int32), mask=begins)
            tl.store(p_run + 2 * (so_far - 1 - begins.to(tl.int32)) + 1, o, mask=ends)
            begun += tl.sum(begins.to(tl.int32))
