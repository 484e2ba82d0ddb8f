"""The tile schedule: which tiles a kernel visits, as runs of equal tiles, by row-block or by column-block.

Three launches build all the schedules that a pass needs from the columns' intervals, without a host sync:
`schedule_kernels`. The states of tiles are exact (so a tile that several intervals and the diagonal fill only jointly
is skipped). `fm_longctx.mask.tiles` counts them in plain torch, by another method: the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fm_longctx.kernels.schedule_kernels import order_kernel, runs_kernel, summary_kernel
from fm_longctx.mask import FlashMask
from fm_longctx.mask.tiles import FULL, PARTIAL

Key = tuple[int, int, bool]
"""block_m, block_n (a power of two), and whether the schedule is by row-block."""

# States of tiles that exist at once while schedules are built, one byte each.
_MAX_STATES = 1 << 24
# Runs that there is room for, beside 32 a block.
_POOL = 1 << 20
_LARGEST_TILE = 128
# Integers of a cache line: a row of bounds that begins elsewhere takes one line more to read.
_LINE = 32
# By time on an H100 (benchmarks/notes/portable.md): tiles of a block that are looked at together, and that are counted
# together where looking does not tell; warps, and what a thread may have, less than it would take: more blocks at once.
_CHUNK, _AT_ONCE = 128, 4
_WARPS, _REGISTERS = 2, 96
# Columns of a program that sums them up.
_SPAN = 512
# Blocks that a program places, and that it compares with them together.
_OWN, _COMPARED = 16, 256


class TileRuns(NamedTuple):
    """Per block (of rows, or of columns) the tiles to visit, ascending, as runs that are all partial or all full.

    With n blocks, group g = b * H_mask + h and block i::

        run = first[g, i]
        for r in range(run, run + run_count[g, i]):
            for other_block in range(runs[r, 0] >> 1, runs[r, 1]): visit it; it is partial if runs[r, 0] & 1

    A kernel need look neither at the mask nor at the sequence's end in a full tile: the last column-block is always
    partial if it is ragged. Only rows past the end remain, which every kernel can do harmlessly.

    Memory: 8 bytes a run. Schedules that are built together share the room. Any of up to 2^20 tiles together and,
    beyond that, any of up to 2^20 runs and 32 a block on average are exact. If they need more, the blocks that found no
    room visit everything between their first and last tile as partial: slower, and the same result bit for bit.
    """

    runs: Tensor
    """int32 `[room, 2]`: first tile << 1 | partial, and the tile after the last. Of all schedules built together."""
    first: Tensor
    """int32 `[B * H_mask, n]`: the block's first run."""
    run_count: Tensor
    """int32 `[B * H_mask, n]`: the number of its runs."""
    tiles: Tensor
    """int32 `[B * H_mask, n]`: the number of tiles to visit."""
    order: Tensor
    """int32 `[B * H_mask, n]`: the blocks, most tiles first, so that the last to run are short; of equal ones the first
    comes first, so that the order of the launches is a function of the mask alone."""
    bounds: Tensor
    """What partial tiles read, the same for all schedules of a mask: int32 `[B * H_mask, R, N_k rounded up]`.

    Rows 2 i and 2 i + 1 hold interval i: its start, and 2^31 - 1 less its end. So the zeros past the last column, also
    those that TMA fills in, are the interval that hides every row. R is a power of two, at least 2, as TMA's boxes are;
    N_k is rounded up to a multiple of the largest tile, so that no read needs a predicate.
    """


def tile_runs(mask: FlashMask, block_m: int, block_n: int, *, by_row: bool) -> TileRuns:
    """Runs of `[block_m, block_n]` tiles that are not skipped, cached on the mask. Never waits for the device.

    `by_row` lists the column-blocks of each row-block (forward, dQ); otherwise the row-blocks of each column-block
    (dK, dV).
    """
    return all_tile_runs(mask, [(block_m, block_n, by_row)])[0]


def all_tile_runs(mask: FlashMask, keys: Sequence[Key]) -> list[TileRuns]:
    """`tile_runs` of several shapes. Those that the mask has not cached are built together, in the time of one."""
    places = [(TileRuns, *key) for key in keys]
    missing = tuple(place[1:] for place in dict.fromkeys(places) if place not in mask.cache)
    if missing:
        with_bounds = "bounds" not in mask.cache
        # The operator is what torch.compile can trace; otherwise its dispatch would take as long as the kernels.
        build = _build_traced if torch.compiler.is_compiling() else _build
        flat = [int(part) for key in missing for part in key]
        table = build(mask.starts, mask.ends, mask.num_rows, mask.causal, flat, with_bounds)
        _take_apart(table, mask, missing, with_bounds)
    return [mask.cache[place] for place in places]


def _take_apart(table: Tensor, mask: FlashMask, keys: Sequence[Key], with_bounds: bool) -> None:
    """Cache the parts of what `_build` returns."""
    plan = _Plan.of(mask.starts, mask.num_rows, keys, with_bounds)
    runs = table.as_strided((plan.room, 2), (2, 1), 4 * plan.numbers)
    if with_bounds:
        _, rows, columns = plan.bounds
        mask.cache["bounds"] = table.as_strided(plan.bounds, (rows * columns, columns, 1), plan.first_bound)
    at = 0
    for key, blocks in zip(keys, plan.blocks, strict=True):
        stride = _padded(plan.groups * blocks)
        parts = table.as_strided((4, plan.groups, blocks), (stride, blocks, 1), 4 * at)
        first, run_count, tiles, order = parts.unbind()
        place = (TileRuns, *key)
        mask.cache[place] = TileRuns(runs, first, run_count, tiles, order, mask.cache["bounds"])
        at += stride


class _Plan(NamedTuple):
    """What `_build` returns: int32, of each schedule `first`, `run_count`, `tiles` and `order`; the runs; the bounds.

    Blocks are numbered through, with gaps so that each schedule begins at a multiple of four. A block's number is also
    the run that it has for itself, which is all that most need; behind these runs lies the pool.
    """

    groups: int
    blocks: list[int]
    """Of each schedule, a group."""
    others: int
    """The most tiles that a block has."""
    numbers: int
    room: int
    bounds: tuple[int, int, int]
    first_bound: int
    size: int

    @staticmethod
    def of(starts: Tensor, num_rows: int, keys: Sequence[tuple[int, int, int]], with_bounds: bool) -> _Plan:
        batch, heads, intervals, columns = starts.shape
        groups = batch * heads
        blocks, most, numbers, tiles = [], 0, 0, 0
        for block_m, block_n, by_row in keys:
            own, others = -(-num_rows // block_m), -(-columns // block_n)
            if not by_row:
                own, others = others, own
            blocks.append(own)
            most = max(most, others)
            numbers += _padded(groups * own)
            tiles += groups * own * others
        # One to spare, because walks read one run ahead.
        room = numbers + min(tiles, _POOL + 32 * numbers) + 1
        first_bound = _padded(4 * numbers + 2 * room, _LINE)
        rows = max(2, triton.next_power_of_2(2 * intervals))
        bounds = (groups, rows, max(1, -(-columns // _LARGEST_TILE)) * _LARGEST_TILE)
        size = first_bound + with_bounds * groups * rows * bounds[2]
        return _Plan(groups, blocks, most, numbers, room, bounds, first_bound, size)


def _build(starts: Tensor, ends: Tensor, num_rows: int, causal: bool, keys: Sequence[int], with_bounds: bool) -> Tensor:
    """keys: three integers a schedule. One tensor, as `_Plan` says: an operator may not return parts of one."""
    shapes = tuple(zip(keys[0::3], keys[1::3], keys[2::3], strict=True))
    plan = _Plan.of(starts, num_rows, shapes, with_bounds)
    intervals, columns = starts.shape[2:]
    table = starts.new_empty(plan.size)
    unit = min(keys[1::3])
    span = max(_SPAN, unit)
    # How many runs of the pool are taken, two integers and two to align; the summary; states, by program.
    stride = -(-max(1, plan.others) // 16) * 16
    programs = max(1, min(plan.numbers, _MAX_STATES // stride))
    first_state = 4 + _padded(plan.groups * intervals * 4 * triton.cdiv(columns, unit))
    temporary = starts.new_empty(first_state + programs * stride // 4)
    with torch.cuda.device_of(starts):
        if plan.groups:
            summary_kernel[(plan.groups, triton.cdiv(plan.bounds[2], span))](
                starts,
                ends,
                table,
                temporary,
                plan.first_bound,
                num_rows,
                columns,
                intervals,
                plan.bounds[1],
                BOUNDS=with_bounds,
                PADDED_TO=_LARGEST_TILE,
                UNIT=unit,
                SPAN=span,
            )
        if plan.numbers:
            runs_kernel[(programs,)](
                starts,
                ends,
                table,
                temporary,
                first_state,
                stride,
                num_rows,
                columns,
                intervals,
                plan.groups,
                plan.numbers,
                plan.room - 1,
                KEYS=shapes,
                CAUSAL=causal,
                UNIT=unit,
                CHUNK=_CHUNK,
                AT_ONCE=_AT_ONCE,
                PARTIAL=PARTIAL,
                FULL=FULL,
                num_warps=_WARPS,
                maxnreg=_REGISTERS,
            )
            order_kernel[(len(shapes) * plan.groups, triton.cdiv(max(plan.blocks), _OWN))](
                table, num_rows, columns, plan.groups, KEYS=shapes, OWN=_OWN, CHUNK=_COMPARED
            )
    return table


_build_traced = torch.library.custom_op("fm_longctx::tile_runs", _build, mutates_args=())


@_build_traced.register_fake
def _(starts: Tensor, ends: Tensor, num_rows: int, causal: bool, keys: Sequence[int], with_bounds: bool) -> Tensor:
    shapes = list(zip(keys[0::3], keys[1::3], keys[2::3], strict=True))
    return starts.new_empty(_Plan.of(starts, num_rows, shapes, with_bounds).size)


def _padded(entries: int, to: int = 4) -> int:
    """Room for as many, so that what follows is aligned: to 16 bytes, if nothing else is said."""
    return -(-entries // to) * to
