"""Training on one GPU: our attention against FlexAttention and a dense mask in the same model; memory; the longest.

    python -m benchmarks.train --out <folder>                                    everything
    python -m benchmarks.train --out <folder> --cells speed modes --limit 500     goes on where a run before has ended
    python -m benchmarks.train --out <folder> --cells longest million --only ours
    python -m benchmarks.train --smoke --out <folder>                            every path on a CPU; figures are no use
    python -m benchmarks.train --report <folder>/<file>.jsonl                    tables and picture again; no GPU

Sections (`--cells`):
  speed        an eighth of the 8B (4 layers, vocabulary 16032) and the 1B at 128K, 64K and 32K tokens of packed
               documents: ours, FlexAttention (compiled), SDPA with a dense mask; all but attention compiled, as much
               kept as there is room for; all else the same
  modes        ours, the 8B's eighth at 128K with other checkpoints, with and without compiled layers
  memory       peak memory of each way of keeping activations, beside the estimator's
  longest      the whole 8B at 128K, 160K, 192K and 256K tokens: bfloat16 with stochastic rounding (needs torchao;
               `ours_nearest` does without it, for memory and speed alone), activations offloaded
  million      the 1B at 512K and 1M tokens of documents of up to 128K
  convergence  200 steps of a 160M model on text, ours and the dense mask, from the same start on the same batches

Each arm's first loss, gradient norm and gradient norm of the query projections are compared with ours before any speed
is written: an arm that differs by more than 0.2%, 2% and 5% is reported as wrong. Rows are written as they are measured
to <out>/<date>-train.jsonl; with them come .md and the convergence's .csv and .png. An arm that runs out of memory is
recorded as failed and the next one goes on; after a broken CUDA context the process starts anew. `--limit` stops before
an arm when so many seconds have passed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.environment import environment
from benchmarks.records import Records, Row, read
from benchmarks.train_cells import SECTIONS, TrainCell, cells
from benchmarks.train_report import write_report
from benchmarks.train_run import Refused, free, run

# Of the first step: bfloat16 attention in another order of sums stays well below. The loss of fresh weights hardly
# knows the mask; the gradients of the query projections do.
TOLERANCES = {"losses": 0.002, "grad_norms": 0.02, "query_grad_norms": 0.05}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.report:
        print(write_report(options.report.with_suffix(""), read(options.report)))
        return
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --smoke runs every path on a CPU, --report needs none.")
    # Peaks of 100 GiB and more leave no room for blocks that do not fit together.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = "cpu" if options.smoke else "cuda"
    deadline = time.monotonic() + options.limit
    about = environment(options.commit) | {"transformers": version("transformers")}
    options.out.mkdir(parents=True, exist_ok=True)
    records = Records(options.out / f"{options.date or about['date']}-train.jsonl", about)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    for cell in chosen(options):
        arms = [arm for arm in cell.arms if not options.only or arm in options.only]
        for arm in records.missing(cell, arms, retry=options.retry):
            if time.monotonic() > deadline:
                print("stopped at --limit; the same command goes on from here", flush=True)
                break
            row = measure(cell, arm, device, records)
            print(line(records.add(cell, row)), flush=True)
            if row["status"] == "failed" and "CUDA error" in row["reason"]:
                _start_anew(deadline)
    print(write_report(records.path.with_suffix(""), records.rows()))
    if dist.is_initialized():
        dist.destroy_process_group()


def chosen(options: argparse.Namespace) -> list[TrainCell]:
    """The cells to run, in order: that of `--match` if it is given, else that of `--cells`."""
    found = [cell for section in options.cells for cell in cells(section, smoke=options.smoke)]
    if not options.match:
        return found
    wanted = [[cell for cell in found if text in cell.key] for text in options.match]
    missing = [text for text, some in zip(options.match, wanted, strict=True) if not some]
    if missing:
        raise SystemExit(f"--match {missing[0]} is in no key of --cells {' '.join(options.cells)}.")
    return list(dict.fromkeys(cell for some in wanted for cell in some))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="sections, in this order")
    parser.add_argument("--match", nargs="+", help="only cells whose key contains one of these, in this order")
    parser.add_argument("--only", nargs="+", help="only these arms: ours, flex, dense, ours_nearest")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no arm is begun")
    parser.add_argument("--commit", help="default: git rev-parse HEAD, if there is a repository")
    parser.add_argument("--date", help="of the file to go on with; today's if not given")
    parser.add_argument("--retry", action="store_true", help="run again what failed or was wrong")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--report", type=Path, help="only write the report of this file")
    return parser.parse_args(arguments)


def measure(cell: TrainCell, arm: str, device: str, records: Records) -> Row:
    """The arm's row, whatever happens."""
    begin = time.monotonic()
    try:
        row = run(cell, arm, device)
    except Refused as refusal:
        row = {"status": "refused", "reason": str(refusal)}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        row = {"status": "failed", "reason": text[:500]}
    # Outside the except clauses: inside, the traceback would hold the arm's tensors.
    free()
    ours = next((r for r in records.rows() if r["key"] == cell.key and r["competitor"] == "ours"), None)
    if row["status"] == "ok" and arm != "ours" and ours is not None and ours["status"] == "ok":
        off = {name: _difference(row, ours, name) for name in TOLERANCES}
        wrong = [f"{name} {off[name]:.1%}" for name, most in TOLERANCES.items() if not off[name] <= most]
        if wrong:
            row = {"status": "wrong", "reason": f"its first step is off ours: {', '.join(wrong)}"}
    return {"competitor": arm, "seconds": round(time.monotonic() - begin, 1)} | row


def _difference(row: Row, ours: Row, name: str) -> float:
    return abs(float(row[name][0]) / float(ours[name][0]) - 1)


def line(row: Row) -> str:
    start = f"{row['key']:<60} {row['competitor']:<12} "
    if row["status"] != "ok":
        return start + f"{row['status']}: {row['reason']}"
    mfu = f"{row['mfu']:.1%} MFU  " if row.get("mfu") else ""
    peak = f"peak {row['peak_gib']:.1f} GiB, estimated " if row.get("peak_gib") else "estimated "
    return (
        f"{start}{row['tokens_per_second']:>10,.0f} tokens/s  {mfu}{row['visible']:.1%} visible  {peak}"
        f"{row['estimated_gib']:.1f} GiB  ({row['seconds']} s in all)"
    )


def _start_anew(deadline: float) -> None:
    print("the CUDA context is lost, starting anew", flush=True)
    left = max(1.0, deadline - time.monotonic())
    limit = [] if left == float("inf") else ["--limit", str(left)]
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *limit])


if __name__ == "__main__":
    main()
