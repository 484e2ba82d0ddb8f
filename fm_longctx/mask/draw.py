"""Pictures of masks, at tile resolution: a million tokens draw as quickly as a thousand.

Rows (queries) run down, columns (keys) run right. A cell of the picture is a tile, coloured by what it is: skipped (no
visible score), partial or full. Small masks draw one score a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fm_longctx.mask.tiles import tile_area

if TYPE_CHECKING:
    from fm_longctx.mask.flash_mask import FlashMask

# At most this many cells a side: finer ones would be smaller than a pixel.
MAX_CELLS = 640
# Cells this few a side get lines between them.
_MAX_RULED = 40

_SKIPPED = "#eef0f3"
_PARTIAL = "#f2a65a"
_FULL = "#2b5c8a"
# Neighbours differ in hue and lightness both; more ranks than these share a continuous scale.
_RANKS = ("#3f6fb0", "#e8743b", "#2e8b57", "#d4b02a", "#8e3a80", "#55b5d9", "#c0465a", "#8a8f2a", "#5b4bb7", "#7d6552")
# How much of its colour a partial tile of a rank keeps, the rest being white.
_TINT = 0.55


def draw(
    mask: FlashMask,
    path: str | PathLike[str],
    *,
    block: int | None = None,
    rank_of_row: Sequence[int] | Tensor | None = None,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
) -> None:
    """Save a picture of one batch entry and mask head of a mask.

    Args:
        mask: any device.
        path: ends in `.png` or `.svg`; the folder exists.
        block: rows and columns a cell. By default the smallest power of two that gives at most 640 cells a side.
        rank_of_row: the rank, >= 0, that owns each row, `[N_q]`: each rank's rows get a colour of their own (a tint of
            it where a tile is partial). A cell of several ranks takes the colour of the one with most rows in it.
        batch, head: which of the mask's matrices.
        title: above the picture; by default the size and the visible share.

    Raises:
        ValueError: another suffix, a block < 1, an index out of range, or a `rank_of_row` that does not fit the rows.
    """
    suffix = fspath(path).rpartition(".")[2].lower()
    if suffix not in ("png", "svg"):
        raise ValueError(f"path must end in .png or .svg, got {fspath(path)!r}.")
    for name, index, size in (("batch", batch, mask.batch), ("head", head, mask.heads)):
        if not 0 <= index < size:
            raise ValueError(f"{name} must be in [0, {size}) for this mask, got {index}.")
    longest = max(mask.num_rows, mask.num_columns)
    if block is None:
        block = 1 << max(0, math.ceil(math.log2(max(1, longest) / MAX_CELLS)))
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block must be an integer >= 1, got {block!r}.")

    one = mask.from_canonical(
        mask.starts[batch : batch + 1, head : head + 1].cpu(),
        mask.ends[batch : batch + 1, head : head + 1].cpu(),
        causal=mask.causal,
        num_rows=mask.num_rows,
    )
    ranks = None if rank_of_row is None else _check_ranks(rank_of_row, mask.num_rows)
    num_ranks = 0 if ranks is None else int(ranks.max(initial=0)) + 1
    owners = None if ranks is None else palette(num_ranks)[rank_of_block(ranks, block)]
    image = cell_colours(visible_share(one, block), owners)
    if title is None:
        scores = mask.num_rows * mask.num_columns
        visible = int(one.area()) / scores if scores else 0.0
        title = f"{mask.num_rows:,} rows x {mask.num_columns:,} columns, {visible:.1%} visible"
    figure = _figure(image, one, block, owners, num_ranks, title)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # The canvas objects, not pyplot: a library must not touch the caller's figures or backend.
    canvas: Any = FigureCanvasAgg(figure) if suffix == "png" else FigureCanvasSVG(figure)
    canvas.print_figure(fspath(path), format=suffix, metadata={"Date": None} if suffix == "svg" else None)


def visible_share(mask: FlashMask, block: int) -> np.ndarray:
    """Visible share of each `[block, block]` tile of batch 0, head 0, float64 `[row-blocks, column-blocks]`."""
    rows = _block_sizes(mask.num_rows, block)
    columns = _block_sizes(mask.num_columns, block)
    return tile_area(mask, block, block)[0, 0].numpy() / (rows[:, None] * columns[None, :])


def cell_colours(shares: np.ndarray, owners: np.ndarray | None) -> np.ndarray:
    """RGB of each cell, float64 `[row-blocks, column-blocks, 3]` in 0..1.

    Args:
        shares: visible share of each cell.
        owners: RGB of each row-block's rank, float64 `[row-blocks, 3]`, or None for the colours of a mask alone.
    """
    from matplotlib.colors import to_rgb

    image = np.empty((*shares.shape, 3))
    partial = (shares > 0) & (shares < 1)
    if owners is None:
        image[...] = to_rgb(_FULL)
        image[partial] = to_rgb(_PARTIAL)
    else:
        image[...] = owners[:, None, :]
        image[partial] = _tint(image[partial])
    image[shares == 0] = to_rgb(_SKIPPED)
    return image


def _figure(
    image: np.ndarray, mask: FlashMask, block: int, owners: np.ndarray | None, num_ranks: int, title: str
) -> Any:
    """The matplotlib figure: the matrix, a strip of its rows' owners if there are ranks, and the legend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    n_q, n_k = max(1, mask.num_rows), max(1, mask.num_columns)
    # Very long or flat matrices are stretched to a third of the longer side, so that they stay readable.
    longer = max(n_q, n_k)
    width, height = (5.2 * max(n / longer, 1 / 3) for n in (n_k, n_q))
    left, right, top, bottom = 0.95, 1.75, 0.55, 0.65
    figure = Figure(figsize=(left + width + right, top + height + bottom), dpi=160, facecolor="white")
    total_width, total_height = figure.get_size_inches()

    def place(x: float, inches: float) -> Any:
        return figure.add_axes((x / total_width, bottom / total_height, inches / total_width, height / total_height))

    axes = place(left, width)
    axes.set_facecolor(_SKIPPED)
    # Edges of the ragged last tiles lie beyond the matrix: place whole tiles, show the matrix.
    extent = (0, image.shape[1] * block, image.shape[0] * block, 0)
    if image.size:
        axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
    axes.set(xlim=(0, n_k), ylim=(n_q, 0))
    axes.set_xlabel("column (key)", color="#333333")
    axes.set_ylabel("row (query)", color="#333333")
    axes.set_title(title, fontsize=10.5, loc="left", color="#222222")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
    axes.tick_params(labelsize=8.5, color="#999999", labelcolor="#444444")
    for spine in axes.spines.values():
        spine.set(color="#b5bac1", linewidth=0.8)
    if max(image.shape[:2]) <= _MAX_RULED:
        axes.vlines(np.arange(block, n_k, block), 0, n_q, color="white", linewidth=0.7)
        axes.hlines(np.arange(block, n_q, block), 0, n_k, color="white", linewidth=0.7)
    if owners is not None and len(owners):
        # Who owns a row shows even where the row sees too little to be coloured.
        strip = place(left + width + 0.06, 0.09)
        strip.imshow(owners[:, None, :], extent=(0, 1, extent[2], 0), interpolation="nearest", aspect="auto")
        strip.set(ylim=(n_q, 0))
        strip.set_axis_off()
    figure.legend(
        handles=_legend_handles(block, num_ranks),
        title="one cell = one score" if block == 1 else f"one cell = {block} x {block}",
        loc="upper left",
        bbox_to_anchor=((left + width + 0.22) / total_width, 1 - top / total_height),
        borderaxespad=0.0,
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
        alignment="left",
    )
    return figure


def _legend_handles(block: int, num_ranks: int) -> list[Any]:
    """What each colour means."""
    from matplotlib.patches import Patch

    names = ("masked", "visible") if block == 1 else ("skipped", "full")
    entries: list[tuple[Any, str]] = [(_SKIPPED, names[0])]
    if num_ranks == 0:
        if block > 1:
            entries.append((_PARTIAL, "partial"))
        entries.append((_FULL, names[1]))
    else:
        colours = palette(num_ranks)
        # Beyond what a legend can list, every so many ranks show how the scale runs.
        shown = range(0, num_ranks, -(-num_ranks // 16))
        entries += [(colours[rank], f"rank {rank}") for rank in shown]
        if block > 1:
            entries.append((_tint(colours[0]), "partial (tint)"))
    return [Patch(facecolor=colour, edgecolor="#b5bac1", linewidth=0.5, label=name) for colour, name in entries]


def palette(num_ranks: int) -> np.ndarray:
    """Colour of each rank, float64 `[num_ranks, 3]`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if num_ranks <= len(_RANKS):
        return np.array([to_rgb(colour) for colour in _RANKS[:num_ranks]]).reshape(-1, 3)
    return colormaps["turbo"](np.linspace(0.04, 0.94, num_ranks))[:, :3]


def _tint(colours: np.ndarray) -> np.ndarray:
    return 1 - _TINT * (1 - colours)


def _block_sizes(length: int, block: int) -> np.ndarray:
    return np.diff(np.minimum(np.arange(-(-length // block) + 1) * block, length))


def rank_of_block(ranks: np.ndarray, block: int) -> np.ndarray:
    """The rank with most rows in each row-block, int64 `[row-blocks]`; the lowest of several."""
    num_blocks, num_ranks = -(-len(ranks) // block), int(ranks.max(initial=0)) + 1
    cell = np.arange(len(ranks)) // block * num_ranks + ranks
    return np.bincount(cell, minlength=num_blocks * num_ranks).reshape(num_blocks, num_ranks).argmax(axis=1)


def _check_ranks(rank_of_row: Sequence[int] | Tensor, num_rows: int) -> np.ndarray:
    ranks = torch.as_tensor(rank_of_row)
    if ranks.shape != (num_rows,) or (num_rows and (ranks.is_floating_point() or int(ranks.min()) < 0)):
        raise ValueError(
            f"rank_of_row must give each of the {num_rows} rows a rank >= 0, got {ranks.dtype} {list(ranks.shape)}"
            + (f" with minimum {ranks.min().item()}." if ranks.numel() else ".")
        )
    return ranks.cpu().numpy().astype(np.int64)
