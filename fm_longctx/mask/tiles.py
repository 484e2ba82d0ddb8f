"""Exact classification of a mask's tiles: skipped, partial or full.

A tile is skipped exactly when its masked scores fill it, however many intervals (and the diagonal) share the work, and
full exactly when it holds none. Counting needs no pass over rows x columns: an interval's overlap with a row-block is
the difference of two ramps, and a ramp summed over a column-block is (how many interval bounds lie above this
row-block) x (row) - (sum of those bounds). Two histograms and a cumulative sum give every tile's count in
O(K·N_k + tiles).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fm_longctx.mask.canonical import diagonal

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask

SKIPPED, PARTIAL, FULL = 0, 1, 2

# Cells (tiles) counted at once: bounds the int64 temporaries at a few hundred MB for million-token masks.
_MAX_CELLS = 1 << 23


def tile_states(mask: "FlashMask", block_m: int, block_n: int) -> Tensor:
    """State of every `[block_m, block_n]` tile, uint8 `[B, H_mask, ceil(N_q/block_m), ceil(N_k/block_n)]`.

    0 is skipped, 1 partial, 2 full. Tiles at the ragged edge are judged by the scores that exist.
    """
    n_r, n_c = -(-mask.num_rows // block_m), -(-mask.num_columns // block_n)
    states = torch.empty((mask.batch, mask.heads, n_r, n_c), dtype=torch.uint8, device=mask.device)
    step = max(1, _MAX_CELLS // max(1, mask.batch * mask.heads * n_r))
    for c0 in range(0, n_c, step):
        c1 = min(c0 + step, n_c)
        masked = _masked_counts(mask, block_m, block_n, c0, c1)
        rows = _block_sizes(mask.num_rows, block_m, 0, n_r, mask.device)
        columns = _block_sizes(mask.num_columns, block_n, c0, c1, mask.device)
        size = rows[:, None] * columns[None, :]
        block = states[..., c0:c1]
        block.fill_(PARTIAL)
        block[masked == size] = SKIPPED
        block[masked == 0] = FULL
    return states


def tile_area(mask: "FlashMask", block_m: int, block_n: int) -> Tensor:
    """Unmasked scores of every tile, int64 `[B, H_mask, ceil(N_q/block_m), ceil(N_k/block_n)]`."""
    n_r, n_c = -(-mask.num_rows // block_m), -(-mask.num_columns // block_n)
    rows = _block_sizes(mask.num_rows, block_m, 0, n_r, mask.device)
    columns = _block_sizes(mask.num_columns, block_n, 0, n_c, mask.device)
    return rows[:, None] * columns[None, :] - _masked_counts(mask, block_m, block_n, 0, n_c)


def _block_sizes(length: int, block: int, first: int, last: int, device: torch.device) -> Tensor:
    edges = (torch.arange(first, last + 1, device=device) * block).clamp(max=length)
    return edges.diff()


def _masked_counts(mask: "FlashMask", block_m: int, block_n: int, c0: int, c1: int) -> Tensor:
    """Masked scores of each tile in column-blocks c0..c1, int64 `[B, H_mask, row-blocks, c1 - c0]`."""
    b, h, n_q = mask.batch, mask.heads, mask.num_rows
    n_r, n_c = -(-n_q // block_m), c1 - c0
    columns = slice(c0 * block_n, min(c1 * block_n, mask.num_columns))
    column_block = torch.arange(columns.start, columns.stop, device=mask.device) // block_n - c0

    count = torch.zeros((b * h, (n_r + 1) * n_c), dtype=torch.int64, device=mask.device)
    total = torch.zeros_like(count)

    def add_ramps(bounds: Tensor, sign: int) -> None:
        """Add sign x max(0, row - bound) for each bound in `[b * h, columns]`, as counts and sums per row-block."""
        # A bound inside block r is active from the lower edge of block r + 1 on: ceil, not floor.
        cell = (bounds + block_m - 1).div(block_m, rounding_mode="floor") * n_c + column_block
        count.scatter_add_(1, cell, torch.full_like(cell, sign))
        total.scatter_add_(1, cell, bounds * sign)

    for bounds, sign in ((mask.starts, 1), (mask.ends, -1)):
        for i in range(mask.num_intervals):
            add_ramps(bounds[:, :, i, columns].reshape(b * h, -1).long(), sign)
    if mask.causal:
        hidden = diagonal(n_q, mask.num_columns, mask.device)[columns].long().expand(b * h, -1)
        add_ramps(torch.zeros_like(hidden), 1)
        add_ramps(hidden, -1)

    edges = (torch.arange(n_r + 1, device=mask.device) * block_m).clamp(max=n_q)
    count = count.view(b, h, n_r + 1, n_c).cumsum(2)
    total = total.view(b, h, n_r + 1, n_c).cumsum(2)
    return (count * edges[:, None] - total).diff(dim=2)
