"""What the attention backends are to reach on an H200, and what a run of the benchmark says about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records import Row
from benchmarks.sparsity import fit_line
from benchmarks.tables import geometric_mean, markdown, ratios, sparsity_points, tflops


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate to reach at every length from `least_n` on: the slowest counts."""

    backend: str
    section: str
    case: str
    d: int
    heads: tuple[int, int] | None = None
    least_n: int = 32768
    most_n: int = 2**30
    direction: str
    target: float


RATES = (
    Rate(backend="hopper", section="cases", case="causal", d=128, direction="forward", target=680),
    Rate(backend="hopper", section="cases", case="full", d=128, direction="forward", target=700),
    Rate(backend="hopper", section="cases", case="causal", d=128, direction="backward", target=560),
    *(
        Rate(
            backend="hopper",
            section="packs",
            case="pack",
            d=128,
            heads=(64, 8),
            most_n=32768,
            direction=direction,
            target=target,
        )
        for direction, target in (("forward", 580.0), ("backward", 430.0))
    ),
    Rate(backend="hopper", section="cases", case="causal", d=64, direction="forward", target=470),
    Rate(backend="hopper", section="cases", case="causal", d=64, direction="backward", target=430),
    Rate(backend="hopper", section="cases", case="causal", d=256, direction="forward", target=650),
    Rate(backend="triton", section="cases", case="causal", d=128, most_n=32768, direction="forward", target=420),
    Rate(backend="triton", section="cases", case="causal", d=128, most_n=32768, direction="backward", target=300),
)

LENGTHS = (32768, 131072)
"""Those of the benchmark that rates are to be reached at."""

# (backend, peer, direction, least geometric mean, least ratio in any cell, cells); of the paper's cases and its D.
HEAD_DIMS = (64, 128)
RATIOS = (
    ("hopper", "flex", "total", 1.8, 1.2, 72),
    ("hopper", "cudnn", "total", None, 1.05, 12),
    ("triton", "flex", "forward", None, 1.0, 72),
    ("triton", "flex", "backward", None, 1.0, 72),
    ("triton", "flex", "total", 1.2, None, 72),
)
LEAST_R_SQUARED = 0.99

# (what, at N, most): of all schedules of a training step, of packed causal documents.
SCHEDULE = (
    ("ms of a step's schedules, % of one 32-head forward", 131072, 1.0),
    ("MB of a step's schedules a mask head", 2**20, 64.0),
)


def targets_table(rows: Sequence[Row]) -> str:
    """A line a target; `-` where the run did not measure it, `so far` where it measured a part of it."""
    lines = []
    for rate in RATES:
        found = {
            (row["n"], row["seed"]): value
            for row in rows
            if row["competitor"] == rate.backend
            and (row["section"], row["case"], row["d"]) == (rate.section, rate.case, rate.d)
            and rate.heads in (None, (row["heads"], row["kv_heads"]))
            and rate.least_n <= row["n"] <= rate.most_n
            and (value := tflops(row, rate.direction)) is not None
        }
        where = f"N {rate.least_n}" + ("" if rate.most_n == rate.least_n else " and more")
        heads = f", {rate.heads[0]}:{rate.heads[1]} heads" if rate.heads else ""
        what = f"{rate.direction} TFLOP/s, {rate.case}, D {rate.d}{heads}, {where}"
        whole = {n for n in LENGTHS if rate.least_n <= n <= rate.most_n} <= {n for n, _ in found}
        got = min(found.values(), default=None)
        lines.append(_line(rate.backend, what, rate.target, got, "{:.0f}", whole=whole))
    paper = [row for row in rows if row["section"] == "cases" and row["d"] in HEAD_DIMS]
    for backend, peer, direction, mean, least, cells in RATIOS:
        times = list(ratios(paper, backend, peer, direction).values())
        what, whole = f"{direction} over {peer}, {len(times)} of {cells} cells", len(times) == cells
        if mean is not None:
            got = geometric_mean(times) if times else None
            lines.append(_line(backend, f"{what}: geometric mean", mean, got, "{:.2f}", whole=whole))
        if least is not None:
            lines.append(_line(backend, f"{what}: least", least, min(times, default=None), "{:.2f}", whole=whole))
    swept = [row for row in rows if row["section"] == "sparsity"]
    for backend in ("hopper", "triton"):
        for direction in ("forward", "backward"):
            points = sparsity_points(swept, backend, "band_of_blocks", direction)
            fit = fit_line([x for x, _ in points], [y for _, y in points]).r_squared if len(points) > 2 else None
            what = f"{direction} ms against sparsity: R^2 of a line"
            lines.append(_line(backend, what, LEAST_R_SQUARED, fit, "{:.4f}"))
    for backend in ("hopper", "triton"):
        for (what, n, most), figure in zip(SCHEDULE, (_share_of_forward, _megabytes), strict=True):
            here = (row for row in rows if row["section"] == "schedule" and row["competitor"] == backend)
            got = next((figure(row) for row in here if row["n"] == n and row["status"] == "ok"), None)
            lines.append(_line(backend, f"{what}, packed causal documents, N {n}", most, got, "{:.2f}", at_most=True))
    return markdown(["backend", "what", "target", "measured", "reached"], lines)


def _share_of_forward(row: Row) -> float:
    return 100 * row["both_schedule_ms"] / row["forward_ms"]


def _megabytes(row: Row) -> float:
    """The schedule benchmark's masks have one head."""
    return row["both_schedule_bytes"] / 1e6


def _line(
    backend: str,
    what: str,
    target: float,
    got: float | None,
    form: str,
    *,
    at_most: bool = False,
    whole: bool = True,
) -> list[str]:
    start = [backend, what, f"{'<=' if at_most else '>='} {target:g}"]
    if got is None:
        return [*start, "-", "-"]
    reached = got <= target if at_most else got >= target
    return [*start, form.format(got), "no" if not reached else "yes" if whole else "so far"]
