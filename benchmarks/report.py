"""Rows -> the dated page of results: what was measured where, a section's tables, its picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import plots, tables
from benchmarks.records import Row
from benchmarks.targets import targets_table

Tables = Sequence[Callable[[Sequence[Row]], str]]

SECTIONS: dict[str, tuple[str, Tables, Callable[[Sequence[Row], Path], None]]] = {
    "cases": ("The paper's masks", (tables.summary_table, tables.race_table), plots.plot_cases),
    "sparsity": (
        "Latency against sparsity",
        (tables.sparsity_table, tables.summary_table, tables.race_table),
        plots.plot_sparsity,
    ),
    "memory": ("Memory against N", (tables.memory_table,), plots.plot_memory),
    "schedule": ("The tile schedule's cost", (tables.schedule_table,), plots.plot_schedule),
    "packs": ("GQA on packed documents", (tables.summary_table, tables.race_table), plots.plot_cases),
}

NOTES = """All competitors of a cell ran on the same inputs, each checked against float32 attention from the mask's rule
in words before it was timed. Median of repetitions with the L2 cache flushed before each; the forward keeps what the
backward needs. Every sample of a batch has the same mask. TFLOP/s count 4 D a visible score and head forward, 2.5 times
that backward. Ratios are the peer's time over ours: above 1 ours is ahead.
"""


def write_report(stem: Path, rows: Sequence[Row]) -> str:
    """Write <stem>.csv, <stem>.md and <stem>-<section>.png; returns the page's text.

    Args:
        rows: of one device; one a cell and competitor (`benchmarks.records.latest`).
    """
    if not rows:
        return "nothing was measured, so there is no report."
    tables.write_csv(stem.with_name(f"{stem.name}.csv"), rows)
    page = f"# Attention benchmark, {', '.join(sorted({row['date'] for row in rows}))}\n\n"
    for command in dict.fromkeys(row["command"] for row in rows):
        page += f"```\n{command}\n```\n\n"
    for name in ("device", "torch", "triton", "cuda", "python", "commit"):
        page += f"- {name}: {', '.join(dict.fromkeys(row[name] for row in rows))}\n"
    page += f"\n{NOTES}{tables.commits_note(rows)}"
    page += f"\n## Targets\n\n{targets_table(rows)}"
    for section, (title, texts, plot) in SECTIONS.items():
        found = [row for row in rows if row["section"] == section]
        if not found:
            continue
        page += f"\n## {title}\n"
        right = [row for row in found if row["status"] == "ok"]
        if right:
            picture = stem.with_name(f"{stem.name}-{section}.png")
            plot(right, picture)
            page += f"\n![{title}]({picture.name})\n"
        page += "".join(f"\n{text(found)}" for text in texts)
        if len(right) < len(found):
            page += f"\nNot timed:\n\n{tables.notes_table(found)}"
    stem.with_name(f"{stem.name}.md").write_text(page)
    return page
