"""Where context parallelism runs into its limits, by the cost model: 1M-16M tokens over 8-4096 GPUs. CPU only.

    python -m benchmarks.link_model                          # the table of docs/context_parallel.md
    python -m benchmarks.link_model --host-ranks 1 --tokens 1 --ranks 8

Everything is modelled from a plan's exact counts, except planning time, which is measured, in CPU seconds of one
thread, for all choices of head parallelism that were weighed. The mask is a pack of the published length mix, seed 0,
causal. A cell with fewer than --least tokens a GPU, or more than --most, is left out.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.environment import environment
from benchmarks.packs import pack
from fm_longctx import ShardPlan
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.mask import builders


def main() -> None:
    defaults = CostModel()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16], help="Mi tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--least", type=int, default=2048, help="tokens a rank")
    parser.add_argument("--most", type=int, default=1 << 18, help="tokens a rank")
    parser.add_argument("--host-ranks", type=int, default=defaults.host_ranks)
    parser.add_argument("--host-bandwidth", type=float, default=defaults.host_bandwidth, help="within a host")
    parser.add_argument("--bandwidth", type=float, default=defaults.bandwidth, help="between hosts")
    parser.add_argument("--latency", type=float, default=defaults.latency)
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cost = CostModel(
        bandwidth=options.bandwidth,
        host_bandwidth=options.host_bandwidth,
        host_ranks=options.host_ranks,
        latency=options.latency,
    )
    print(environment(options.commit), cost, sep="\n")
    print(
        "\n| tokens | GPUs | rings x heads | tokens a GPU | imbalance | received, of all-gather | MiB received, most | "
        "stages | forward, slowest | of it waiting | of ideal | limit | s to plan |\n" + "|---" * 13 + "|"
    )
    for mega in options.tokens:
        n = mega << 20
        mask = builders.causal_document(pack(n, seed=0))
        for ranks in options.ranks:
            if not options.least <= n // ranks <= options.most:
                continue
            begin = time.process_time()
            plan = ShardPlan.build(mask, ranks, head_parallel="auto", cost=cost)
            seconds = time.process_time() - begin
            report = plan.report()
            forward, slowest = report.forward, int(report.forward.total.argmax())
            total, waits = float(forward.total[slowest]), float(forward.exposed[slowest])
            ideal = report.ideal[0]
            lost = {
                "imbalance": float(forward.compute.max()) - float(forward.compute.mean()),
                "traffic": waits,
                "merging": float(forward.compute.mean()) - ideal,
            }
            limit = max(lost, key=lambda name: lost[name]) if total > 1.05 * ideal else "none"
            print(
                f"| {mega}M | {ranks} | {plan.rings} x {plan.head_parallel} | {n // ranks:,} | "
                f"{plan.imbalance:.3f} | {plan.received_fraction:.3f} | "
                f"{report.received.sum(1).max() / 2**20:.0f} | {plan.num_stages} | {1e3 * total:.2f} ms | "
                f"{1e3 * waits:.2f} ms | {ideal / total:.0%} | {limit} | {seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
