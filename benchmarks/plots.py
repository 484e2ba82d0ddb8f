"""The report's pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.records import Row
from benchmarks.tables import by_cell, sparsity_points, tflops

COLOURS = {
    "hopper": "#1b5e9f",
    "triton": "#5fa8dc",
    "reference": "#9ecae1",
    "flex": "#d9822b",
    "flex_tuned": "#f0b878",
    "cudnn": "#5b8c3a",
    "flash": "#a3c585",
    "fa4": "#7b5ea7",
    "dense": "#9a9a9a",
}


def plot_cases(rows: Sequence[Row], path: Path) -> None:
    """TFLOP/s of each competitor: a column of panels an N, a row a direction and shape of heads, bars a case."""
    lengths = sorted({row["n"] for row in rows})
    shapes = sorted({_shape(row) for row in rows})
    names = [name for name in COLOURS if any(row["competitor"] == name and row["status"] == "ok" for row in rows)]
    widest = max(len({row["case"] for row in rows if row["n"] == n}) for n in lengths)
    size = (max(4.0, 0.5 * widest) * len(lengths), 6 * len(shapes))
    figure, grid = plt.subplots(
        2 * len(shapes), len(lengths), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for i, (shape, direction) in enumerate(itertools.product(shapes, ("forward", "backward"))):
        for axes, n in zip(grid[i], lengths, strict=True):
            cells = list(by_cell(row for row in rows if row["n"] == n and _shape(row) == shape).values())
            labels = [_label(next(iter(cell.values()))) for cell in cells]
            _bars(axes, cells, names, direction)
            d, heads, kv_heads = shape
            axes.set_title(f"{direction}, N {n}, D {d}, {heads}:{kv_heads} heads", fontsize=9)
            axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s over the visible area")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
    _save(figure, path)


def plot_sparsity(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds against the share of hidden scores, a panel a family of masks and direction."""
    families = list(dict.fromkeys(row["case"].split("@")[0] for row in rows))
    size = (9, 3.6 * len(families))
    figure, grid = plt.subplots(len(families), 2, figsize=size, squeeze=False, layout="constrained")
    for axes_row, family in zip(grid, families, strict=True):
        for axes, direction in zip(axes_row, ("forward", "backward"), strict=True):
            for name, colour in COLOURS.items():
                points = sparsity_points(rows, name, family, direction)
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot([100 * share for share in x], y, marker="o", markersize=3, label=name, color=colour)
            axes.set_title(f"{family.replace('_', ' ')}, {direction}", fontsize=9)
            axes.set_xlabel("hidden scores, %")
            axes.set_ylabel("ms")
            axes.set_ylim(bottom=0)
    grid[0, 0].legend(fontsize=7)
    _save(figure, path)


def plot_memory(rows: Sequence[Row], path: Path) -> None:
    """Bytes against N, both logarithmic: each method's mask, ours with its tile schedule; and what a pass needs beside.

    The second panel has what was measured only: the peak of a forward and backward beyond inputs and results.
    """
    peers = {"dense": "dense mask", "flex": "FlexAttention's block mask"}
    figure, grid = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, colour in COLOURS.items():
        own = sorted((r for r in rows if r["competitor"] == name and r["status"] == "ok"), key=lambda r: int(r["n"]))
        masks = [(r["n"], r["mask_bytes"] + r.get("schedule_bytes", 0)) for r in own]
        peaks = [(r["n"], r["workspace_bytes"]) for r in own if r["measured"]]
        label = peers.get(name, f"{name}: mask and schedule")
        for axes, points, said in zip(grid, (masks, peaks), (label, name), strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=said, color=colour)
    for axes, title in zip(grid, ("mask", "peak beyond inputs and results"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel="bytes", title=title)
        if axes.has_data():
            axes.legend(fontsize=7)
    _save(figure, path)


def plot_schedule(rows: Sequence[Row], path: Path) -> None:
    """Building the tile schedule as a share of one layer's forward, against N."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, colour in COLOURS.items():
        for passes, style in (("forward", "-"), ("both", "--")):
            found = sorted(
                (row["n"], 100 * row[f"{passes}_schedule_ms"] / row["forward_ms"])
                for row in rows
                if row["competitor"] == name and row["status"] == "ok"
            )
            if found:
                label = f"{name}, {'a training step' if passes == 'both' else 'forward'}"
                axes.plot(*zip(*found, strict=True), style, marker="o", markersize=3, label=label, color=colour)
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="schedule, % of one layer's forward")
    axes.legend(fontsize=7)
    _save(figure, path)


def _bars(axes: Axes, cells: Sequence[dict[str, Row]], names: Sequence[str], direction: str) -> None:
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        heights = [tflops(cell[name], direction) if name in cell else None for cell in cells]
        at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cells))]
        axes.bar(at, [height or 0 for height in heights], width, label=name, color=COLOURS[name])


def _label(row: Row) -> str:
    return f"{row['case']} {row['seed']}" if row["case"] == "pack" else row["case"].replace("_", " ")


def _shape(row: Row) -> tuple[int, int, int]:
    return (row["d"], row["heads"], row["kv_heads"])


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
