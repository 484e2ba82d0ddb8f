"""Rows of benchmarks/train.py -> markdown tables, a CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import Row
from benchmarks.tables import by_cell
from benchmarks.train_cells import SECTIONS

HEAD = (
    "| shape | layers | N | kept | attention | tokens/s | of dense | MFU | TFLOP/s | visible | peak GiB | estimate | "
    "first loss | grad norm |"
)
WHAT = {
    "speed": "The same model and steps with three attentions; under selective checkpoints none repeats its attention",
    "modes": "Ours under other checkpoints, with and without compiled layers",
    "memory": "Peak memory beside the estimator's",
    "longest": "Llama-3.1-8B's shape, whole, on one GPU; activations offloaded to the host",
    "million": "The 1B at up to a million tokens of documents of up to 131072",
    "convergence": "The same steps with our attention and with a dense mask",
}


def write_report(base: Path, rows: Sequence[Row]) -> str:
    """`<base>.md`, and of convergence `<base>-convergence.csv` and `.png`. Returns the markdown."""
    if not rows:
        return "no rows"
    last = rows[-1]
    facts = ("device", "torch", "triton", "transformers", "cuda", "python")
    lines = [f"# Training on one GPU, {last['date']}", ""]
    lines += [f"- {name}: {last[name]}" for name in facts if name in last]
    for made in dict.fromkeys((row["commit"], row["command"]) for row in rows):
        count = sum((row["commit"], row["command"]) == made for row in rows)
        lines.append(f"- commit {made[0]}, {count} of {len(rows)} rows: {made[1]}")
    lines += [
        "",
        "Tokens/s, TFLOP/s and MFU are over the steps after the warm-up, mask preparation included. TFLOP/s count "
        "three forwards over the real area, and nothing for what is computed twice. Tokens are random and documents "
        "follow the length mix of benchmarks/packs.py, except for convergence. A wrong or failed arm has no speed.",
    ]
    for section in SECTIONS:
        found = [row for row in rows if row["section"] == section]
        if found:
            lines += ["", f"## {section}", "", WHAT[section] + ".", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
            for cell in by_cell(found).values():
                lines += [_line(row, cell) for row in cell.values()]
            lines += _reasons(found)
            if section == "convergence":
                lines += _convergence(base, found)
    text = "\n".join(lines) + "\n"
    base.with_suffix(".md").write_text(text)
    return text


def _line(row: Row, cell: dict[str, Row]) -> str:
    kept = row["checkpointing"] + "".join(f", {name}" for name in ("offload", "compile") if row[name])
    kept += f", {row['mlp_kept']} MLPs" if row.get("mlp_kept") else ""
    kept += f", loss by {row['loss_chunk']}" if row.get("loss_chunk", 4096) != 4096 else ""
    kept += f", MLP by {row['mlp_chunk']}" if row["mlp_chunk"] else ""
    start = f"| {row['shape']} | {row['layers']} | {row['n']} | {kept} | {row['competitor']} |"
    if row["status"] != "ok":
        return start + f" {row['status']} |" + " |" * 8
    dense = cell.get("dense", {})
    # Convergence times every step, those that compile too.
    compared = dense.get("status") == "ok" and row["section"] != "convergence"
    ratio = f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}x" if compared else ""
    figures = [
        f"{row['tokens_per_second']:,.0f}",
        ratio,
        _number(row.get("mfu"), "{:.1%}"),
        f"{row['tflops']:,.1f}",
        f"{row['visible']:.1%}",
        _number(row.get("peak_gib"), "{:.1f}"),
        _estimate(row),
        f"{row['losses'][0]:.4f}",
        f"{row['grad_norms'][0]:.3f}",
    ]
    return start + " " + " | ".join(figures) + " |"


def _estimate(row: Row) -> str:
    """Of our arm: the estimator knows nothing of the others' attention."""
    if row["competitor"] not in ("ours", "ours_nearest"):
        return ""
    off = f" ({row['estimated_gib'] / row['peak_gib'] - 1:+.1%})" if row.get("peak_gib") else ""
    return f"{row['estimated_gib']:.1f}{off}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _reasons(rows: Sequence[Row]) -> list[str]:
    told = [
        f"- {row['key']} {row['competitor']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"
    ]
    return ["", *told] if told else []


def _convergence(base: Path, rows: Sequence[Row]) -> list[str]:
    """The losses side by side."""
    arms = {row["competitor"]: row["losses"] for row in rows if "losses" in row}
    if len(arms) < 2:
        return []
    path = base.with_name(base.name + "-convergence.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *arms])
        writer.writerows([i + 1, *values] for i, values in enumerate(zip(*arms.values(), strict=True)))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    ours, dense = (
        (next(iter(arms.values())), list(arms.values())[1])
        if "dense" not in arms
        else (
            arms["ours"],
            arms["dense"],
        )
    )
    steps = range(1, len(ours) + 1)
    above.plot(steps, dense, label="dense mask", color="#9a9a9a", linewidth=3)
    above.plot(steps, ours, label="fm_longctx", color="#1b5e9f", linewidth=1)
    above.set_ylabel("loss, nats a byte")
    above.legend()
    below.plot(steps, [a - b for a, b in zip(ours, dense, strict=True)], color="#1b5e9f", linewidth=1)
    below.set(xlabel="step", ylabel="difference")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    largest = max(abs(a - b) for a, b in zip(ours, dense, strict=True))
    medians = ", ".join(f"{row['competitor']} {row['seconds_per_step']:.3f} s" for row in rows if "losses" in row)
    return [
        "",
        f"A step in the median: {medians}. Tokens/s are of all steps here, those that compile too.",
        "",
        f"Largest difference of a step's loss: {largest:.2e}; after {len(ours)} steps {ours[-1]:.4f} and "
        f"{dense[-1]:.4f}. [Every step]({path.name}), ![losses]({picture.name})",
    ]
