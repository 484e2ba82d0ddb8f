"""The attention op against its peers: speed on the paper's masks, speed against sparsity, memory, schedule, GQA packs.

    python -m benchmarks.attention --warm 15                         everything, on one GPU
    python -m benchmarks.attention --sections cases --lengths 131072 --warm 15 --out <folder> --commit <hash>
    python -m benchmarks.attention --quick                           three masks at 8K, D 128: does it all run?
    TRITON_INTERPRET=1 python -m benchmarks.attention --smoke        every path on a CPU in seconds; figures are no use
    python -m benchmarks.attention --report <older>.jsonl <newer>.jsonl          one page of several runs; no GPU

Sections (`--sections`, by number or name):
  1 cases      the paper's 12 masks x N 8K, 32K, 128K x D 64, 128; 128K tokens, hidden 4096, bf16; forward and backward
  2 sparsity   N 32K, D 128: masks of 0% to 100% skipped tiles, and causal documents of 50% to 95% hidden scores
  3 memory     bytes of the mask and beyond inputs and results, to 1M tokens; N x N masks and block masks beside it
  4 schedule   ms and bytes of the tile schedule, beside one 32-head forward of packed causal documents, 1K to 1M tokens
  5 packs      GQA 64:8 and 32:4 on packs of documents of a published length mix, N 32K and 128K

A cell is one mask at one shape; every competitor runs in one process on the same inputs. Before it is timed, a result
is compared with float32 attention that knows the mask by its rule in words (benchmarks/sampled_check.py); a wrong one
is reported as WRONG and has no speed. One that raises is reported with its error, one that kills its process or gives
no answer for `--patience` seconds as failed. What goes wrong while a cell is timed is in the rows of all
who were right until then; `--retry` measures them again. The samples of a batch share a mask.

Repetitions: `--budget-ms` of them, `--least` at the least; calls of more than `--long-ms` run twice, and the second is
their time. A cell's competitors are repeated in turn, so that the clock to which one has driven the card is no
other's. Every cell's block mask, tile schedule and compilation is made before it is timed.

FlexAttention compiles a forward and a backward kernel for each cell, and ours for each kind of mask. `--warm` processes
do so at once, before anything is timed; then each measures the cells that it compiled for, one process at a time, while
the others leave the GPU alone. `--limit` ends a run in good order before a time limit from outside does. Rows are
written as they are measured: the same command goes on where one ended, and `--also` takes rows of another file as
measured. What another commit measured is measured again.

Writes <out>/<date>-attention.jsonl (the rows), .csv, .md and one .png a section. A page may be of several runs, with
`--report`, or where the file has rows of more than one commit: the last row of a cell and competitor counts, and each
says its commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import PAPER_CASES, PRESETS, SECTIONS, Cell, Sizes, section_cells
from benchmarks.crew import Crew, Timing, measure
from benchmarks.environment import environment
from benchmarks.peers import OURS, Settings
from benchmarks.records import Records, Row, latest, read
from benchmarks.tables import tflops
from benchmarks.timing import Timer
from benchmarks.warm import configure_compiler, jobs, use_caches

RACED = ("hopper", "triton", "flex", "cudnn", "flash", "dense", "fa4")
COMPETITORS = {
    "cases": RACED,
    "sparsity": ("hopper", "triton", "flex"),
    "memory": ("hopper", "triton", "flex", "dense"),
    "schedule": ("hopper", "triton"),
    "packs": ("hopper", "triton", "flex", "fa4"),
}
ON_REQUEST = ("flex_tuned",)  # minutes of tuning a cell


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.report:
        report(options.report)
        return
    begin = time.monotonic()
    device = "cpu" if options.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --smoke runs every path on a CPU, --report needs none.")
    use_caches(options.cache)
    settings = Settings(dense_limit=options.dense_limit, dense_cases=tuple(options.dense_cases))
    timing = Timing(budget_ms=0.0 if options.smoke else options.budget_ms, least=options.least, long_ms=options.long_ms)
    deadline = begin + options.limit
    with ExitStack() as stack:
        crew = None
        if options.warm or device == "cuda":
            crew = Crew(max(1, options.warm), settings, device, timing, deadline=deadline, patience=options.patience)
            stack.enter_context(crew)
        about = environment(options.commit)
        records = Records(options.out / f"{options.date or about['date']}-attention.jsonl", about, options.also)
        print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
        sizes = chosen_sizes(options)
        pending = [
            (cell, missing)
            for section in options.sections
            for cell in section_cells(section, sizes)
            if (missing := records.missing(cell, names_of(section, options), retry=options.retry))
        ]
        if crew and options.warm:
            crew.compile(jobs(pending))
        compiled = time.monotonic()
        print(f"compiled in {compiled - begin:.0f} s", flush=True)
        timed = run(pending, records, deadline, crew, settings, timing, device)
    measured = time.monotonic()
    report([*options.also, records.path])
    print(
        f"seconds: start and compiling {compiled - begin:.0f}; cells {measured - compiled:.0f}, of which repetitions "
        f"{timed:.0f}; report {time.monotonic() - measured:.0f}; all {time.monotonic() - begin:.0f}"
    )


def run(
    pending: list[tuple[Cell, list[str]]],
    records: Records,
    deadline: float,
    crew: Crew | None,
    settings: Settings,
    timing: Timing,
    device: str,
) -> float:
    """Measure what is missing, in the crew or, without one, here; returns the seconds that repetitions took."""
    if crew is None:
        configure_compiler()
        timer = Timer(device, **dataclasses.asdict(timing))
    timed = 0.0
    for done, (cell, missing) in enumerate(pending):
        begin = time.monotonic()
        if begin >= deadline:
            left = sum(bool(records.missing(cell, missing)) for cell, missing in pending[max(0, done - 1) :])
            print(f"stopped at --limit, {left} cells to go; the same command goes on from here", flush=True)
            break
        for row in crew.measure(cell, missing) if crew else measure(cell, missing, settings, device, timer):
            row["seconds"] = round(time.monotonic() - begin, 2)
            timed += row.get("timed_seconds", 0.0)
            print(line(records.add(cell, row)), flush=True)
            begin = time.monotonic()
    return timed


def report(files: Sequence[Path]) -> None:
    """One page of all the files' rows, beside the last file; later files' rows replace earlier ones'."""
    # Only here: the processes that measure import this module, and need no pictures.
    from benchmarks.report import write_report

    rows = [row for file in files if file.exists() for row in read(file)]
    kept = latest(rows)
    if others := sorted({row["device"] for row in rows} - {row["device"] for row in kept}):
        print(f"left out: rows of {', '.join(others)}; a page is of one device, the last row's")
    print(write_report(files[-1].with_suffix(""), kept))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small part of each section")
    preset.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, our reference backend")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), help="names or numbers; all if not given")
    parser.add_argument(
        "--cases", nargs="+", choices=PAPER_CASES, metavar="MASK", help=f"section 1: only of {', '.join(PAPER_CASES)}"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="section 1: these N only")
    parser.add_argument("--head-dims", type=int, nargs="+", help="section 1: these D; the last also in the others")
    parser.add_argument("--tokens", type=int, help="tokens in a batch (131072)")
    parser.add_argument(
        "--competitors",
        nargs="+",
        choices=(*RACED, *ON_REQUEST, "reference"),
        metavar="NAME",
        help=f"these only, of those that a section has: {', '.join(RACED)}; {', '.join(ON_REQUEST)} only if named",
    )
    parser.add_argument("--dense-limit", type=int, default=8192, help="longest N timed with an N x N mask")
    parser.add_argument(
        "--dense-cases", nargs="+", default=Settings.dense_cases, help="masks on which an N x N mask is timed"
    )
    parser.add_argument("--budget-ms", type=float, default=80.0, help="measuring time a competitor and direction")
    parser.add_argument("--least", type=int, default=3, help="fewest repetitions")
    parser.add_argument("--long-ms", type=float, default=800.0, help="a call beyond this runs twice, the second counts")
    parser.add_argument("--warm", type=int, default=0, help="processes that compile beforehand; 0: none")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for a competitor; flex_tuned needs more")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fm_longctx_benchmark_cache")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which the run stops, whatever it is at"
    )
    parser.add_argument("--retry", action=argparse.BooleanOptionalAction, help="measure again what failed or was wrong")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results; with --smoke a new temporary one)")
    parser.add_argument("--date", help="of the file to go on with; today if not given")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="files of rows that count as measured")
    parser.add_argument("--report", type=Path, nargs="+", help="one page of these files, by the last; measures nothing")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args(arguments)
    options.sections = [SECTIONS[int(x) - 1] if x in ("1", "2", "3", "4", "5") else x for x in options.sections]
    if options.out is None:
        # What a CPU measured must not end up among results.
        options.out = Path(tempfile.mkdtemp(prefix="smoke_")) if options.smoke else Path("benchmarks/results")
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"--sections: {section!r} is none of {', '.join(SECTIONS)}, nor 1 to {len(SECTIONS)}")
    return options


def chosen_sizes(options: argparse.Namespace) -> Sizes:
    sizes = PRESETS["smoke" if options.smoke else "quick" if options.quick else "full"]
    given = {name: getattr(options, name) for name in ("cases", "lengths", "head_dims", "tokens")}
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    return dataclasses.replace(sizes, **changes)


def names_of(section: str, options: argparse.Namespace) -> list[str]:
    """The competitors of a section: on a CPU our reference backend stands for the others."""
    names = list(COMPETITORS[section])
    if section not in ("memory", "schedule"):
        names += [name for name in ON_REQUEST if name in (options.competitors or ())]
    if options.smoke:
        names = ["reference", *(name for name in names if name not in OURS)]
    return [name for name in names if not options.competitors or name in options.competitors]


def line(row: Row) -> str:
    start = f"{row['key']:64} {row['competitor']:9} {row['status']:7}"
    if row["status"] != "ok":
        return f"{start} {row['note'].splitlines()[0][:160]}"
    if row["section"] == "memory":
        return f"{start} mask {row['mask_bytes']:,} schedule {row.get('schedule_bytes', 0):,} bytes"
    if row["section"] == "schedule":
        return f"{start} schedule {row['both_schedule_ms']:.3f} ms, forward {row['forward_ms']:.3f} ms"
    parts = [
        f"{direction} {row[f'{direction}_ms']:9.3f} ms {tflops(row, direction):5.0f} TFLOP/s"
        for direction in ("forward", "backward")
        if f"{direction}_ms" in row
    ]
    return f"{start} {'  '.join(parts)}"


if __name__ == "__main__":
    main()
