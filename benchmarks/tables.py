"""Rows -> what is said about them: rates, ratios, means, and the tables of the report."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.peers import OURS
from benchmarks.records import Row
from benchmarks.sparsity import fit_line, pays_until

BACKWARD = 2.5
"""Operations of the backward over those of the forward: five products against two."""


def flops(row: Row) -> float:
    """Operations of the forward: 4 D a visible score and head."""
    return 4.0 * row["d"] * row["heads"] * row["batch"] * row["area"]


def tflops(row: Row, direction: str) -> float | None:
    """TFLOP/s of `forward`, `backward` or `total`; None where it was not timed or is not right."""
    ms = milliseconds(row, direction)
    share = {"forward": 1.0, "backward": BACKWARD, "total": 1 + BACKWARD}[direction]
    return share * flops(row) / ms / 1e9 if ms else None


def milliseconds(row: Row, direction: str) -> float | None:
    if row["status"] != "ok":
        return None
    if direction != "total":
        return row.get(f"{direction}_ms")
    forward, backward = row.get("forward_ms"), row.get("backward_ms")
    return None if forward is None or backward is None else forward + backward


def geometric_mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("no values, so no mean.")
    return math.exp(sum(math.log(value) for value in values) / len(values))


def by_cell(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Cell key -> competitor -> row, in the rows' order."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["key"], {})[row["competitor"]] = row
    return cells


def ratios(rows: Iterable[Row], ours: str, peer: str, direction: str) -> dict[str, float]:
    """Cell key -> the peer's time over ours (above 1: ours is ahead), where both have one."""
    found = {}
    for key, cell in by_cell(rows).items():
        if ours in cell and peer in cell:
            a, b = milliseconds(cell[ours], direction), milliseconds(cell[peer], direction)
            if a and b:
                found[key] = b / a
    return found


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def commits_note(rows: Sequence[Row]) -> str:
    """What a table of several commits needs to say: in which cells not all rows are of one; nothing if it is of one."""
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    if len(commits) == 1:
        return ""
    right = by_cell(row for row in rows if row["status"] == "ok")
    mixed = [key for key, cell in right.items() if len({row["commit"] for row in cell.values()}) > 1]
    note = f"Rows are of {len(commits)} commits, the last measured of each cell and competitor; each says which. "
    if not mixed:
        return note + "All of a cell are of one run.\n"
    return note + f"In {len(mixed)} of {len(right)} cells not all are of one run, first in {mixed[0]}.\n"


def race_table(rows: Sequence[Row]) -> str:
    """A line a cell and competitor: ms and TFLOP/s of each direction, and the ratio to FlexAttention."""
    lines = []
    for cell in by_cell(rows).values():
        flex = cell.get("flex")
        for row in cell.values():
            if row["status"] == "refused":
                continue
            line = [row["case"], str(row["n"]), str(row["d"]), f"{row['heads']}:{row['kv_heads']}", str(row["seed"])]
            line += [row["competitor"], row["commit"]]
            if row["status"] == "ok":
                for direction in ("forward", "backward", "total"):
                    ms, rate = milliseconds(row, direction), tflops(row, direction)
                    ratio = _ratio(flex, row, direction)
                    line += [_number(ms, "{:.3f}"), _number(rate, "{:.0f}"), _number(ratio, "{:.2f}")]
            else:
                line += [f"**{row['status'].upper()}**", *[""] * 8]
            lines.append(line)
    header = ["case", "N", "D", "heads", "seed", "competitor", "commit"]
    for direction in ("forward", "backward", "total"):
        header += [f"{direction} ms", "TFLOP/s", "over flex"]
    return markdown(header, lines)


def summary_table(rows: Sequence[Row]) -> str:
    """Ours against each peer: geometric mean, least ratio and where, and in how many cells ours is behind."""
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    lines = []
    for ours in (name for name in names if name in OURS):
        for peer in (name for name in names if name not in OURS):
            for direction in ("forward", "backward", "total"):
                found = ratios(rows, ours, peer, direction)
                if found:
                    least = min(found, key=found.__getitem__)
                    behind = sum(ratio < 1 for ratio in found.values())
                    figures = [f"{geometric_mean(list(found.values())):.2f}", f"{found[least]:.2f}", least]
                    lines.append([ours, peer, direction, str(len(found)), *figures, f"{behind} of {len(found)}"])
    return markdown(
        ["ours", "peer", "direction", "cells", "geometric mean", "least", "in cell", "ours behind in"], lines
    )


def notes_table(rows: Sequence[Row]) -> str:
    """What failed, was wrong, or was not run, with the reason; equal reasons counted together."""
    counts: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reason = " ".join(row.get("note", "").split())
            counts.setdefault((row["competitor"], row["status"], reason), []).append(row["key"])
    lines = [[a, b, str(len(keys)), keys[0], c.replace("|", "/")] for (a, b, c), keys in counts.items()]
    return markdown(["competitor", "status", "cells", "first", "reason"], lines)


def sparsity_points(rows: Iterable[Row], competitor: str, family: str, direction: str) -> list[tuple[float, float]]:
    """(share of hidden scores, ms), ascending."""
    points = []
    for row in rows:
        ms = milliseconds(row, direction)
        if row["competitor"] == competitor and row["case"].split("@")[0] == family and ms is not None:
            points.append((1 - row["area"] / row["n"] ** 2, ms))
    return sorted(points)


def sparsity_table(rows: Sequence[Row]) -> str:
    """A straight line through latency against sparsity for each competitor and family of masks."""
    lines = []
    families = list(dict.fromkeys(row["case"].split("@")[0] for row in rows))
    for family in families:
        for competitor in dict.fromkeys(row["competitor"] for row in rows):
            for direction in ("forward", "backward"):
                points = sparsity_points(rows, competitor, family, direction)
                if len(points) < 3:
                    continue
                x, y = [p[0] for p in points], [p[1] for p in points]
                line = fit_line(x, y)
                until = pays_until(x, y)
                figures = [f"{line.r_squared:.4f}", f"{line.intercept:.3f}", f"{line.intercept + line.slope:.3f}"]
                ends = [f"{y[0]:.3f}", f"{y[-1]:.3f}", "-" if until is None else f"{until:.0%}"]
                lines.append([family, competitor, direction, str(len(points)), *figures, *ends])
    header = ["masks", "competitor", "direction", "points", "R^2", "line at 0%, ms", "line at 100%, ms"]
    return markdown([*header, "least sparse, ms", "most sparse, ms", "skipping pays up to"], lines)


def memory_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            str(row["n"]),
            row["competitor"],
            _mebibytes(row.get("mask_bytes")),
            _mebibytes(row.get("schedule_bytes")),
            _mebibytes(row.get("workspace_bytes")),
            "measured" if row["measured"] else "computed",
        ]
        for row in rows
        if row["status"] == "ok"
    ]
    return markdown(["N", "method", "mask MiB", "schedule MiB", "beyond inputs and results MiB", "peak"], lines)


def schedule_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["status"] == "ok":
            line = [str(row["n"]), row["competitor"], f"{row['forward_ms']:.3f}"]
            for name in ("forward", "both"):
                ms = row[f"{name}_schedule_ms"]
                # Records of before this was measured have no such column.
                host = _number(row.get(f"{name}_schedule_host_ms"), "{:.3f}")
                share = f"{ms / row['forward_ms']:.2%}"
                line += [f"{ms:.3f}", share, host, _mebibytes(row[f"{name}_schedule_bytes"])]
            lines.append(line)
    header = ["N", "backend", "one layer's forward ms"]
    for name in ("forward's schedule", "a step's schedules"):
        header += [f"{name}: ms", "of the forward", "host ms", "MiB"]
    return markdown(header, lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows with all their columns, TFLOP/s added."""
    whole = []
    for row in rows:
        rates = {f"{x}_tflops": tflops(row, x) if "area" in row else None for x in ("forward", "backward", "total")}
        whole.append(row | {name: round(rate, 2) for name, rate in rates.items() if rate is not None})
    columns = list(dict.fromkeys(name for row in whole for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(whole)


def _ratio(flex: Row | None, row: Row, direction: str) -> float | None:
    a, b = milliseconds(row, direction), milliseconds(flex, direction) if flex else None
    return b / a if a and b else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.2f}"
