"""The attention op against its peers: speed on the paper's masks, speed against sparsity, memory, schedule, GQA packs.

    python -m benchmarks.attention --warm 10                         everything, on one GPU
    python -m benchmarks.attention --sections cases --lengths 131072 --warm 10 --out <folder> --commit <hash>
    python -m benchmarks.attention --quick                           three masks at 8K, D 128: does it all run?
    python -m benchmarks.attention --smoke --out <folder>            every path on a CPU in seconds; figures are no use
    python -m benchmarks.attention --report benchmarks/results/<file>.jsonl      tables and pictures again; no GPU

Sections (`--sections`, by number or name):
  1 cases      the paper's 12 masks x N 8K, 32K, 128K x D 64, 128; 128K tokens, hidden 4096, bf16; forward and backward
  2 sparsity   N 32K, D 128: masks of 0% to 100% skipped tiles, and causal documents of 50% to 95% hidden scores
  3 memory     bytes of the mask and beyond inputs and results, to 1M tokens; N x N masks and block masks beside it
  4 schedule   ms and bytes of the tile schedule, beside one 32-head forward of packed causal documents, 1K to 1M tokens
  5 packs      GQA 64:8 and 32:4 on packs of documents of a published length mix, N 32K and 128K

A cell is one mask at one shape; every competitor runs in this process on the same inputs. Before it is timed, a result
is compared with float32 attention that knows the mask by its rule in words (benchmarks/sampled_check.py); a wrong one
is reported as WRONG and has no speed. One that raises is reported with its error. The samples of a batch share a mask.

FlexAttention compiles a forward and a backward kernel for each cell, which is most of the time of a run without
`--warm`; with it, worker processes fill the compilers' caches (`--cache`) beforehand. `--limit` ends a run in good
order before a time limit from outside does. Rows are written as they are measured: the same command goes on where one
ended, and `--also` takes rows of another file as measured. After a competitor that breaks the CUDA context, which is
recorded, the process starts anew.

Writes <out>/<date>-attention.jsonl (the rows), .csv, .md and one .png a section.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import costs
from benchmarks.cells import PRESETS, SECTIONS, Cell, Sizes, section_cells
from benchmarks.environment import environment
from benchmarks.peers import OURS, Settings, competitors
from benchmarks.race import ContextLost, race
from benchmarks.records import Records, Row, read
from benchmarks.report import write_report
from benchmarks.tables import tflops
from benchmarks.timing import Timer
from benchmarks.warm import configure_compiler, use_caches, warm

RACED = ("hopper", "triton", "flex", "cudnn", "flash", "dense", "fa4")
COMPETITORS = {
    "cases": RACED,
    "sparsity": ("hopper", "triton", "flex"),
    "memory": ("hopper", "triton", "flex", "dense"),
    "schedule": ("hopper", "triton"),
    "packs": ("hopper", "triton", "flex", "fa4"),
}
ON_REQUEST = ("flex_tuned",)  # minutes of tuning a cell
# Memory only: an N x N mask at four heads is worth a look beyond the lengths at which it is timed.
DENSE_MEMORY_LIMIT = 32768


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.report:
        rows = [row for file in options.report for row in read(file)]
        last = rows[-1]
        rows = [row for row in rows if (row["device"], row["commit"]) == (last["device"], last["commit"])]
        print(write_report(options.report[-1].with_suffix(""), rows))
        return
    deadline = time.monotonic() + options.limit
    device = "cpu" if options.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --smoke runs every path on a CPU, --report needs none.")
    use_caches(options.cache)
    configure_compiler()
    about = environment(options.commit)
    records = Records(options.out / f"{options.date or about['date']}-attention.jsonl", about, options.also)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)

    sizes = chosen_sizes(options)
    settings = Settings(dense_limit=options.dense_limit, dense_cases=tuple(options.dense_cases))
    pending = [
        (cell, missing)
        for section in options.sections
        for cell in section_cells(section, sizes)
        if (missing := records.missing(cell, names_of(section, options), retry=options.retry))
    ]
    raced = [cell for cell, _ in pending if cell.section in ("cases", "sparsity", "packs")]
    if options.warm:
        names = sorted({name for cell, missing in pending if cell in raced for name in missing})
        warm(raced, names, settings, options.warm, device)
    timer = Timer(device, budget_ms=0.0 if options.smoke else options.budget_ms, least=options.least)
    compiled: tuple[object, ...] | None = None
    for cell, missing in pending:
        if time.monotonic() > deadline:
            print("stopped at --limit; the same command goes on from here", flush=True)
            break
        if cell.compilation != compiled:
            torch._dynamo.reset()  # guards of the cells before would be tried at every call
            compiled = cell.compilation
        try:
            begin = time.monotonic()
            for row in measure(cell, missing, settings, device, timer):
                row["seconds"] = round(time.monotonic() - begin, 2)
                print(line(records.add(cell, row)), flush=True)
                begin = time.monotonic()
        except ContextLost as lost:
            print(f"the CUDA context is lost, starting anew: {lost}", flush=True)
            left = max(1.0, deadline - time.monotonic())
            again = [*sys.orig_argv[1:], "--warm", "0", "--limit", str(left), "--no-retry"]
            os.execv(sys.executable, [sys.executable, *again])
    print(write_report(records.path.with_suffix(""), records.rows()))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small part of each section")
    preset.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, our reference backend")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), help="names or numbers; all if not given")
    parser.add_argument("--cases", nargs="+", help="section 1: these masks only")
    parser.add_argument("--lengths", type=int, nargs="+", help="section 1: these N only")
    parser.add_argument("--head-dims", type=int, nargs="+", help="section 1: these D; the last also in the others")
    parser.add_argument("--tokens", type=int, help="tokens in a batch (131072)")
    parser.add_argument("--competitors", nargs="+", help="these only, of those that a section has; flex_tuned only so")
    parser.add_argument("--dense-limit", type=int, default=8192, help="longest N timed with an N x N mask")
    parser.add_argument(
        "--dense-cases", nargs="+", default=Settings.dense_cases, help="masks on which an N x N mask is timed"
    )
    parser.add_argument("--budget-ms", type=float, default=80.0, help="measuring time a competitor and direction")
    parser.add_argument("--least", type=int, default=3, help="fewest repetitions")
    parser.add_argument("--warm", type=int, default=0, help="processes that compile beforehand; 0: none")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fm_longctx_benchmark_cache")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new cell begins")
    parser.add_argument("--retry", action=argparse.BooleanOptionalAction, help="measure again what failed or was wrong")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results; with --smoke a new temporary one)")
    parser.add_argument("--date", help="of the file to go on with; today if not given")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="files of rows that count as measured")
    parser.add_argument("--report", type=Path, nargs="+", help="tables and pictures of these files; measures nothing")
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


def measure(cell: Cell, names: list[str], settings: Settings, device: str, timer: Timer) -> Iterator[Row]:
    if cell.section == "memory":
        settings = dataclasses.replace(settings, dense_limit=max(settings.dense_limit, DENSE_MEMORY_LIMIT))
        return costs.memory(cell, competitors(names, settings), device)
    if cell.section == "schedule":
        return costs.schedule(cell, names, device, timer)
    return race(cell, competitors(names, settings), device, timer)


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
