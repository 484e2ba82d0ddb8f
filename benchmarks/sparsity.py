"""Masks of a chosen sparsity, and what latency against sparsity says: a line, and where skipping stops paying."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.mask_mods import MaskMod
from fm_longctx.mask import FlashMask

BLOCK = 128


def band_of_blocks(n: int, percent: float, block: int = BLOCK) -> Case:
    """Each row-block sees a run of column-blocks that starts at its own and wraps around; no tile is partial.

    Every row-block and every column-block loses the same number of tiles, so that the load is even at any sparsity and
    latency shows skipping alone. The share of skipped tiles is `percent`, to the nearest tile in n / block.
    """
    blocks, hidden = _band(n, percent, block)
    column = torch.arange(n, dtype=torch.int32) // block
    starts = torch.stack([column + 1, torch.zeros_like(column)])
    ends = torch.stack([(column + 1 + hidden).clamp(max=blocks), (column + 1 + hidden - blocks).clamp(min=0)])
    mask = FlashMask(starts[None, None] * block, ends[None, None] * block, causal=False)

    def visible(r: Tensor, j: Tensor) -> Tensor:
        return (r // block - j // block - 1) % blocks >= hidden

    return Case(name=f"band_of_blocks@{percent:g}", mask=mask, visible=visible)


def band_mask_mod(n: int, percent: float, device: str, block: int = BLOCK) -> MaskMod:
    """The same as a function of one score. The limit is a tensor, so that one compilation serves every sparsity."""
    blocks, hidden = _band(n, percent, block)
    limit = torch.full((blocks,), hidden, dtype=torch.int32, device=device)
    return lambda b, h, q, kv: (q // block + blocks - kv // block - 1) % blocks >= limit[kv // block]


def _band(n: int, percent: float, block: int) -> tuple[int, int]:
    """(blocks, hidden ones among them in each row and column)."""
    if n % block:
        raise ValueError(f"n must be a multiple of the block {block}, got {n}.")
    return n // block, round(percent / 100 * (n // block))


def document_lengths_at(n: int, percent: float) -> list[int]:
    """Lengths of causal documents that hide `percent` (50 or more) of the n x n scores: one long, the others equal.

    At 50% that is a single document. Its mask has no interval, so that a backend may have another kernel for it. How
    straight the line is must be asked with that point and without.
    """
    if not 50 <= percent < 100:
        raise ValueError(f"causal documents hide 50% of the scores or more, and less than all; got {percent}%.")
    squares = 2 * (1 - percent / 100) * n * n
    count = max(1, math.ceil(n * n / squares - 1e-9))
    if count == 1:
        return [n]
    root = math.sqrt(max(0.0, (count - 1) * (count * squares - n * n)))
    short = max(1, round((n * (count - 1) - root) / (count * (count - 1))))
    return [n - (count - 1) * short, *[short] * (count - 1)]


class Line(NamedTuple):
    """y = intercept + slope * x, and the share of y's variance that it explains."""

    intercept: float
    slope: float
    r_squared: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares. Needs two different x; a constant y is explained wholly."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if spread == 0:
        raise ValueError(f"a line needs two different x, got {list(x)}.")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    total = sum((b - mean_y) ** 2 for b in y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Line(intercept, slope, 1.0 if total == 0 else 1 - left / total)


def pays_until(sparsity: Sequence[float], ms: Sequence[float]) -> float | None:
    """The sparsity up to which skipping pays: the end of the last step that saves at least half of what a step saves
    when cost follows the visible share exactly. None if not even the first step does."""
    points = sorted(zip(sparsity, ms, strict=True))
    first_x, first_ms = points[0]
    until = None
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        proportional = first_ms * (x1 - x0) / (1 - first_x)
        if y0 - y1 < proportional / 2:
            break
        until = x1
    return until
