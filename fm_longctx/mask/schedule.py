"""The tile schedule: which tiles to visit, as lists, by row-block or by column-block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fm_longctx.mask.tiles import FULL, PARTIAL, SKIPPED, tile_states

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask


class TileLists(NamedTuple):
    """Per block (of rows, or of columns) the tiles to visit, for each batch and mask head.

    With n blocks, list i = (b * H_mask + h) * n + block is `entries[offsets[i] : offsets[i + 1]]`, ascending; an entry
    is `other_block << 1 | partial`. A kernel that is not asked to hide anything in a tile (`partial` 0) need not look
    at the mask, nor at the sequence's end: the last column-block is always partial if it is ragged.
    """

    offsets: Tensor
    """int32 `[B * H_mask * n + 1]`."""
    entries: Tensor
    """int32 `[visited tiles]`."""
    order: Tensor
    """int32 `[B * H_mask, n]`: the blocks of each list group, longest list first, so that the last to run are short."""


def tile_lists(mask: FlashMask, block_m: int, block_n: int, *, by_row: bool) -> TileLists:
    """Lists of `[block_m, block_n]` tiles that are not skipped, cached on the mask.

    `by_row` lists the column-blocks of each row-block (forward, dQ); otherwise the row-blocks of each column-block
    (dK, dV). Building reads one number back from the device, once per mask and block shape.
    """
    key = ("tiles", block_m, block_n, by_row)
    if key not in mask.cache:
        mask.cache[key] = _build(mask, block_m, block_n, by_row)
    return mask.cache[key]


def _build(mask: FlashMask, block_m: int, block_n: int, by_row: bool) -> TileLists:
    states = tile_states(mask, block_m, block_n)
    if mask.num_columns % block_n:
        last = states[..., -1]
        last[last == FULL] = PARTIAL
    if not by_row:
        states = states.transpose(2, 3)
    visited = states != SKIPPED
    counts = visited.sum(-1, dtype=torch.int32).flatten(0, 1)
    # A stable sort, so that the schedule (and with it the order of the launches) is a function of the mask alone.
    order = counts.sort(dim=1, descending=True, stable=True).indices.int()
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=states.device)
    torch.cumsum(counts.flatten(), 0, dtype=torch.int32, out=offsets[1:])
    where = visited.nonzero(as_tuple=True)
    entries = (where[-1].int() << 1) | (states[where] == PARTIAL).int()
    return TileLists(offsets, entries, order)
