"""Layouts of packed documents over ranks: balance, traffic and planning time, beside the targets. CPU only, one thread.

    python -m benchmarks.planner                     # 20 packs of 8K tokens a rank, seeds 0-19, over 8 and 64 ranks
    python -m benchmarks.planner --tokens 16384 --packs 100 --ranks 8 --out benchmarks/results

Area and traffic are exact counts; traffic is the keys received over what an all-gather receives. The floor is what any
layout of equal shares and at most 2% imbalance must receive (`ShardPlan.floor`): a bound, maybe out of reach. What the
slowest rank waits for the exchange is modelled by the cost model that is printed, forward and one layer. Times are CPU
seconds of one thread, least and median of --repeats, of all that a loader's worker does for a batch: the plan, by keys
alone as the targets have it, and with every head parallelism weighed (`auto`, as the launcher asks); what one rank
needs of it; and the share of an all-gather that is received, which is logged. Whether numba is installed is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.packs import pack
from fm_longctx import ShardPlan
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.mask import FlashMask, builders

# (most imbalance of any, most received on average) over the packs of 8K tokens a rank.
TARGETS = {8: (1.02, 0.25), 64: (1.05, 0.12)}
# (tokens, ranks, most seconds) of planning.
TIMES = [(131_072, 8, 0.02), (1_048_576, 64, 0.2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--packs", type=int, default=20, help="packs, with seeds 0, 1, ...")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each plan; the fastest counts")
    parser.add_argument("--out", type=Path, help="folder for a dated .json; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = environment(options.commit)
    about["numba"] = metadata.version("numba") if util.find_spec("numba") else "none"
    result: dict[str, Any] = {"about": about, "cost": str(CostModel()), "layouts": [], "times": []}
    print(about, CostModel(), sep="\n")
    print("\n| ranks | layout | imbalance | worst | received | worst | floor | waits, modelled | target |")
    print("|---|---|---|---|---|---|---|---|---|")
    for world_size in options.ranks:
        masks = [builders.causal_document(pack(options.tokens * world_size, seed)) for seed in range(options.packs)]
        for layout in ("balanced", "zigzag", "contiguous"):
            row = measure(f"{options.packs} packs", masks, world_size, layout)
            target = TARGETS.get(world_size) if layout == "balanced" and options.tokens == 8192 else None
            result["layouts"].append(row)
            print(line(row, f"{target[0]:.2f}, {target[1]:.2f}" if target else ""), flush=True)
        for layout in ("balanced", "zigzag"):
            row = measure("plain causal", [builders.causal(options.tokens * world_size)], world_size, layout)
            result["layouts"].append(row)
            print(line(row, "no worse than zigzag" if layout == "balanced" else ""), flush=True)
    print(f"\nnumba: {result['about']['numba']}; least and median ms of {options.repeats} runs, after one")
    print("\n| tokens | ranks | mask | to plan | target | to plan, auto | a rank's part | share received |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens, world_size, limit in TIMES:
        for name, mask in (
            ("pack 0", builders.causal_document(pack(tokens, 0))),
            ("pack 1", builders.causal_document(pack(tokens, 1))),
            ("causal", builders.causal(tokens)),
        ):
            timed(mask, world_size)
            runs = [timed(mask, world_size) for _ in range(options.repeats)]
            seconds = {name: [run[name] for run in runs] for name in runs[0]}
            result["times"].append({"tokens": tokens, "ranks": world_size, "mask": name, "seconds": seconds})
            cells = {key: f"{1e3 * min(s):.1f}, {1e3 * statistics.median(s):.1f}" for key, s in seconds.items()}
            print(
                f"| {tokens:,} | {world_size} | {name} | {cells['plan']} | {1e3 * limit:.0f} | {cells['auto']} | "
                f"{cells['part']} | {cells['received']} |",
                flush=True,
            )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{about['date']}-planner.json").write_text(json.dumps(result, indent=1))


def measure(name: str, masks: list[FlashMask], world_size: int, layout: str) -> dict[str, Any]:
    """Means and worst cases of a layout over masks."""
    rows = []
    for mask in masks:
        plan = ShardPlan.build(mask, world_size, strategy=layout)
        report = plan.report()
        slowest = int(report.forward.total.argmax())
        rows.append((plan.imbalance, plan.received_fraction, report.floor, float(report.forward.exposed[slowest])))
    mean, worst = np.mean(rows, axis=0).tolist(), np.max(rows, axis=0).tolist()
    names = ("imbalance", "received", "floor", "waits")
    return {"mask": name, "ranks": world_size, "layout": layout} | {
        key: {"mean": m, "worst": w} for key, m, w in zip(names, mean, worst, strict=True)
    }


def line(row: dict[str, Any], target: str) -> str:
    imbalance, received = row["imbalance"], row["received"]
    return (
        f"| {row['ranks']} | {row['layout']}, {row['mask']} | {imbalance['mean']:.3f} | {imbalance['worst']:.3f} | "
        f"{received['mean']:.3f} | {received['worst']:.3f} | {row['floor']['mean']:.3f} | "
        f"{1e3 * row['waits']['mean']:.2f} ms | {target} |"
    )


def timed(mask: FlashMask, world_size: int) -> dict[str, float]:
    """CPU seconds of what a loader's worker does for a batch, part by part."""
    marks, seconds = [time.process_time()], {}

    def mark(name: str) -> None:
        marks.append(time.process_time())
        seconds[name] = marks[-1] - marks[-2]

    # A new batch has a new mask.
    mask.cache.clear()
    ShardPlan.build(mask, world_size, head_parallel="auto")
    mark("auto")
    mask.cache.clear()
    plan = ShardPlan.build(mask, world_size)
    mark("plan")
    plan.local(world_size // 2)
    mark("part")
    plan.received_fraction  # noqa: B018  (computed at first use)
    mark("received")
    return seconds


if __name__ == "__main__":
    main()
