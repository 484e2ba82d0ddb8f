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
    Rate(backend="triton", section="cases", case="causal", d=128, most_n=32768, direction="forward", target=420),
    Rate(backend="triton", section="cases", case="causal", d=128, most_n=32768, direction="backward", target=300),
)

# (backend, peer, direction, least geometric mean, least ratio in any cell); of the paper's cases.
RATIOS = (
    ("hopper", "flex", "total", 1.8, 1.2),
    ("hopper", "cudnn", "total", None, 1.05),
    ("triton", "flex", "forward", None, 1.0),
    ("triton", "flex", "backward", None, 1.0),
    ("triton", "flex", "total", 1.2, None),
)
LEAST_R_SQUARED = 0.99


def targets_table(rows: Sequence[Row]) -> str:
    """A line a target; `-` where the run did not measure it."""
    lines = []
    for rate in RATES:
        found = [
            value
            for row in rows
            if row["competitor"] == rate.backend
            and (row["section"], row["case"], row["d"]) == (rate.section, rate.case, rate.d)
            and rate.heads in (None, (row["heads"], row["kv_heads"]))
            and rate.least_n <= row["n"] <= rate.most_n
            and (value := tflops(row, rate.direction)) is not None
        ]
        where = f"N {rate.least_n}" + ("" if rate.most_n == rate.least_n else " and more")
        heads = f", {rate.heads[0]}:{rate.heads[1]} heads" if rate.heads else ""
        what = f"{rate.direction} TFLOP/s, {rate.case}, D {rate.d}{heads}, {where}"
        lines.append(_line(rate.backend, what, rate.target, min(found, default=None), "{:.0f}"))
    paper = [row for row in rows if row["section"] == "cases"]
    for backend, peer, direction, mean, least in RATIOS:
        times = list(ratios(paper, backend, peer, direction).values())
        what = f"{direction} over {peer}, {len(times)} cells"
        if mean is not None:
            got = geometric_mean(times) if times else None
            lines.append(_line(backend, f"{what}: geometric mean", mean, got, "{:.2f}"))
        if least is not None:
            lines.append(_line(backend, f"{what}: least", least, min(times, default=None), "{:.2f}"))
    swept = [row for row in rows if row["section"] == "sparsity"]
    for backend in ("hopper", "triton"):
        for direction in ("forward", "backward"):
            points = sparsity_points(swept, backend, "band_of_blocks", direction)
            fit = fit_line([x for x, _ in points], [y for _, y in points]).r_squared if len(points) > 2 else None
            what = f"{direction} ms against sparsity: R^2 of a line"
            lines.append(_line(backend, what, LEAST_R_SQUARED, fit, "{:.4f}"))
    return markdown(["backend", "what", "target", "measured", "reached"], lines)


def _line(backend: str, what: str, target: float, measured: float | None, form: str) -> list[str]:
    if measured is None:
        return [backend, what, f">= {target:g}", "-", "-"]
    return [backend, what, f">= {target:g}", form.format(measured), "yes" if measured >= target else "no"]
