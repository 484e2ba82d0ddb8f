"""What is an exact tile schedule worth? Tiles by the paper's rule against ours, and, on a Hopper GPU, the time of each.

    python -m benchmarks.minmax --length 32768 --head-dim 128

The paper (arXiv 2410.01359, section 4.2) classifies a tile by the least and the greatest of each vector over its
columns: a tile is skipped if one interval, or the diagonal, hides it for all of them, and full if none can touch it.
That visits tiles which are hidden only jointly, and takes some full tiles for partial. The results are the same bits.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from benchmarks.cases import cases
from fm_longctx.kernels.schedule import TileRuns, tile_runs
from fm_longctx.mask import FlashMask
from fm_longctx.mask.tiles import FULL, PARTIAL, SKIPPED, tile_states

FORWARD_TILE, BACKWARD_TILE = (128, 128), (64, 128)


def min_max_states(mask: FlashMask, block_m: int, block_n: int) -> Tensor:
    """As `fm_longctx.mask.tiles.tile_states`, by the paper's rule; a ValueError if its vectors cannot hold the mask."""
    indices = mask.to_startend_row_indices()
    bounds = [indices[..., i] for i in range(indices.shape[-1])]
    last, first = torch.full_like(bounds[0], mask.num_rows), torch.zeros_like(bounds[0])
    seen_from = (torch.arange(mask.num_columns, device=mask.device) - (mask.num_columns - mask.num_rows))[None, None]
    if mask.causal:
        # Canonical intervals begin at the diagonal or below it. Whoever wrote the vectors need not have cut them.
        intervals = [(bounds[0].masked_fill(bounds[0] <= seen_from, 0), bounds[1] if len(bounds) == 2 else last)]
    elif len(bounds) == 2:
        intervals = [(bounds[0], last), (first, bounds[1])]
    else:
        intervals = [(bounds[0], bounds[1]), (bounds[2], bounds[3])]
    row_blocks, column_blocks = -(-mask.num_rows // block_m), -(-mask.num_columns // block_n)
    top = (torch.arange(row_blocks, device=mask.device) * block_m)[:, None]
    bottom = (top + block_m).clamp(max=mask.num_rows)
    hidden = torch.zeros((mask.batch, mask.heads, row_blocks, column_blocks), dtype=torch.bool, device=mask.device)
    touched = torch.zeros_like(hidden)
    for starts, ends in intervals:
        hidden |= (_extreme(starts, block_n, "amax") <= top) & (bottom <= _extreme(ends, block_n, "amin"))
        touched |= (_extreme(starts, block_n, "amin") < bottom) & (top < _extreme(ends, block_n, "amax"))
    if mask.causal:
        hidden |= bottom <= _extreme(seen_from, block_n, "amin")
        touched |= top < _extreme(seen_from, block_n, "amax")
    if mask.num_columns % block_n:
        touched[..., -1] = True  # as in ours: the kernel looks at the end of the columns in partial tiles
    states = torch.full_like(hidden, FULL, dtype=torch.uint8)
    states[touched] = PARTIAL
    states[hidden] = SKIPPED
    return states


def _extreme(bounds: Tensor, block_n: int, reduce: str) -> Tensor:
    """The least or the greatest of each column-block: `[..., N_k]` to `[..., 1, column-blocks]`."""
    parts = [getattr(part, reduce)(-1) for part in bounds.split(block_n, dim=-1)]
    return torch.stack(parts, -1)[..., None, :]


def as_runs(states: Tensor, mask: FlashMask, *, by_row: bool) -> TileRuns:
    """The schedule that these states `[B, H_mask, row-blocks, column-blocks]` make."""
    states = states.flatten(0, 1).long()
    states = states if by_row else states.transpose(1, 2)
    groups, blocks, _ = states.shape
    padded = torch.nn.functional.pad(states, (1, 1))
    before, here = padded[..., :-1], padded[..., 1:]
    begins = ((here != SKIPPED) & (here != before)).nonzero()
    ends = ((before != SKIPPED) & (here != before)).nonzero()
    partial = here[begins.unbind(1)] == PARTIAL
    runs = torch.stack([begins[:, 2] << 1 | partial.long(), ends[:, 2]], 1)
    count = torch.bincount(begins[:, 0] * blocks + begins[:, 1], minlength=groups * blocks).view(groups, blocks)
    first = (count.flatten().cumsum(0) - count.flatten()).view(groups, blocks)
    tiles = (states != SKIPPED).sum(2)
    order = tiles.sort(dim=1, descending=True, stable=True).indices
    spare = torch.zeros((1, 2), dtype=torch.long, device=mask.device)  # walks read one run ahead
    table = [torch.cat([runs, spare]), first, count, tiles, order]
    return TileRuns(*(x.int().contiguous() for x in table), tile_runs(mask, *FORWARD_TILE, by_row=True).bounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=128, choices=[64, 128])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--cases", nargs="+", help="all if not given")
    parser.add_argument("--count-only", action="store_true", help="tiles alone: no GPU is needed")
    options = parser.parse_args()
    device = "cpu" if options.count_only else "cuda"
    print("forward tiles: visited (partial) by the exact schedule, by the paper's rule; ms forward, backward of each")
    for case in cases(options.length):
        if options.cases and case.name not in options.cases:
            continue
        mask = case.mask.to(device)
        try:
            states = {"min/max": min_max_states(mask, *FORWARD_TILE)}
        except ValueError as error:
            print(f"{case.name:24} not expressible: {error}")
            continue
        states = {"exact": tile_states(mask, *FORWARD_TILE)} | states
        line = f"{case.name:24}"
        for found in states.values():
            line += f" {int((found != SKIPPED).sum()):8} ({int((found == PARTIAL).sum()):6})"
        if not options.count_only:
            line += _times(mask, options.length, options.heads, options.head_dim)
        print(line, flush=True)


def _times(mask: FlashMask, n: int, heads: int, d: int) -> str:
    from triton.testing import do_bench

    from fm_longctx.kernels.hopper import launch

    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, n, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    backward_tile = (launch.BACKWARD[d].block_m, launch.BLOCK_N)
    scale = 1 / math.sqrt(d)
    line, expected = "", None
    for exact in (True, False):
        mask.cache.clear()
        if not exact:
            for tile, by_row in ((FORWARD_TILE, True), (backward_tile, False)):
                mask.cache[(TileRuns, *tile, by_row)] = as_runs(min_max_states(mask, *tile), mask, by_row=by_row)

        def forward() -> tuple[Tensor, Tensor]:
            return launch.forward(q, k, v, mask, scale=scale, out_dtype=q.dtype)

        out, lse = forward()
        delta = launch.compute_delta(out, dout, None)

        def backward(lse: Tensor = lse, delta: Tensor = delta) -> tuple[Tensor, Tensor, Tensor]:
            return launch.backward(dout, q, k, v, lse, delta, mask, scale=scale, grad_dtype=q.dtype)

        result = (out, lse, *backward()[1:])
        if expected is not None and not all(map(torch.equal, expected, result)):
            return line + " DIFFERENT RESULTS"
        expected = result
        for run in (forward, backward):
            line += f" {do_bench(run, warmup=10, rep=50, return_mode='median'):8.3f}"
    return line


if __name__ == "__main__":
    main()
