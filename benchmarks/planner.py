"""Layouts of packed documents over ranks: balance, traffic and planning time. CPU only, one thread.

    python -m benchmarks.planner                     # 20 packs of 8K tokens a rank
    python -m benchmarks.planner --tokens 16384 --packs 100 --ranks 8

`balanced` is what `ShardPlan.build` chooses; `zigzag` gives each rank the i-th slice from the front and the i-th from
the back. Area and traffic are exact counts; traffic is the keys received over what an all-gather receives.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.packs import pack
from fm_longctx import ShardPlan
from fm_longctx.context_parallel.coverage import seen_columns, segments
from fm_longctx.mask import FlashMask, builders


def zigzag(mask: FlashMask, world_size: int) -> tuple[float, float]:
    """(imbalance, received fraction) of 2 x world_size slices dealt out to and fro."""
    n = mask.num_rows
    slices = np.arange(n) * 2 * world_size // n
    owner = np.minimum(slices, 2 * world_size - 1 - slices)
    parts = segments(mask, np.array([0, n]))
    areas, fractions = [], []
    for rank in range(world_size):
        mine = owner == rank
        rows = np.flatnonzero(mine)
        areas.append(int(mask.select(torch.from_numpy(rows)).area().sum()))
        fractions.append((seen_columns(parts, rows) & ~mine).sum() / max(1, (~mine).sum()))
    return max(areas) * world_size / max(1, sum(areas)), float(np.mean(fractions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--packs", type=int, default=20, help="packs, with seeds 0, 1, ...")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 7, 8, 16, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(environment())
    print(
        f"{'ranks':>5} {'layout':>9} {'imbalance':>10} {'worst':>6} {'received':>9} {'worst':>6} {'ms':>7} {'worst':>7}"
    )
    for world_size in arguments.ranks:
        table: dict[str, list[tuple[float, float, float]]] = {"balanced": [], "zigzag": []}
        for seed in range(arguments.packs):
            mask = builders.causal_document(pack(arguments.tokens * world_size, seed))
            start = time.perf_counter()
            plan = ShardPlan.build(mask, world_size)
            elapsed = 1e3 * (time.perf_counter() - start)
            table["balanced"].append((plan.imbalance, plan.received_fraction, elapsed))
            table["zigzag"].append((*zigzag(mask, world_size), 0.0))
        for layout, results in table.items():
            mean, worst = np.mean(results, axis=0), np.max(results, axis=0)
            print(
                f"{world_size:>5} {layout:>9} {mean[0]:>10.3f} {worst[0]:>6.3f} {mean[1]:>9.3f} {worst[1]:>6.3f} "
                f"{mean[2]:>7.1f} {worst[2]:>7.1f}"
            )


if __name__ == "__main__":
    main()
