"""What a rank of a context-parallel group computes, measured on one GPU, and with a stated link the time of the group.

    python -m benchmarks.context_parallel --workers 8
    python -m benchmarks.context_parallel --sizes 8 64 --masks causal_document --ranks-sampled 0 --limit 200
    python -m benchmarks.context_parallel --device cpu --tokens 64 --heads 4 2 --head-dim 16 --dtype float32 --sizes 2 4

Replays ranks of a plan one after the other, with random inputs of the right shapes. Measured, as the executor does it:
packing the keys that a stage sends, the attention to those that it receives, the merge; in the backward the gradients
of each stage, packing those that go back, and adding those that return; where heads are split, packing rows and heads
that are traded. Modelled: the link, from the exact bytes of each stage, overlapped as the executor overlaps it, and of
the trade, which nothing hides: --bandwidth and --latency of `CostModel` between hosts of --host-ranks, --host-bandwidth
within them, both at the same time. No figure here is of several GPUs.

Layouts: `balanced` is the plan that the cost model chooses, head parallelism included; `keys` is that without head
parallelism; `zigzag` a plan as well; `all_gather` is the zigzag with all keys gathered before one attention, each sent
to a host once; `ulysses` splits heads over all ranks. Of layouts that are the same plan one is measured. TFLOP/s a GPU
count the mask's area over all ranks, by the slowest rank that was replayed: forward 4 D FLOPs a score and head,
backward 2.5 times that. With --ranks-sampled those are the ranks that the cost model calls the busiest, the median and
the lightest ones. Compute is without the trade, packed or sent.

Packs are of benchmarks/packs.py, the seed of median causal area among 0-19, since a pack's area varies several times
over; --seed names another. A check against the op on the whole sequence comes first. Results are added to --out after
every case, and cases that are in it already, or in --resume, are not run again; with --again those of --resume are, and
take the place of the old ones. Each row keeps the commit that it was measured at. No case is begun after --limit
seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.packs import typical_seed
from benchmarks.replay import LAYOUTS, MASKS, Prepared, cost_model, prepare, replay, warm
from fm_longctx import ShardPlan, flashmask_attention
from fm_longctx.attention.passes import attention_forward, resolve_backend
from fm_longctx.context_parallel.choose import ways_to_split
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.merge import merge_

# TFLOP/s a GPU with the exchange, H100, 64:8 heads of 128, bfloat16, 8K tokens a GPU, packs of another draw than ours:
# what MagiAttention publishes.
PUBLISHED = {
    "causal_document": {8: (459, 361), 16: (427, 372), 32: (316, 334), 64: (239, 265)},
    "causal": {8: (645, 530), 64: (594, 529)},
}
# What tells a case from another: see `describe`.
CASE = (
    *("mask", "ranks", "layout", "seed", "tokens_a_rank", "heads", "head_dim", "dtype", "ranks_sampled"),
    *("bandwidth", "host_bandwidth", "host_ranks", "latency"),
)


def main() -> None:
    options, begin = parse(), time.monotonic()
    check(options)
    about = environment(options.commit)
    path = options.out and options.out / f"{about['date']}-context_parallel.json"
    taken_over, present = rows_of(options.resume), rows_of(path)
    rows = taken_over | present
    # Rows that will be measured again are no measurement of this run's plans.
    old: set[str] = set()
    cases = []
    for name in options.masks:
        for size in options.sizes:
            seed = typical_seed(options.tokens * size) if options.seed is None else options.seed
            for layout in options.layouts:
                key = describe(name, size, layout, seed, options)
                case = case_of(key)
                if case in rows and (case in present or not options.again):
                    continue
                old |= {case} & rows.keys()
                cases.append((key, (name, size, layout, seed, options)))
    for (key, case), prepared in zip(cases, preparations([case for _, case in cases], options), strict=True):
        name, size, layout = case[:3]
        if options.limit and time.monotonic() - begin > options.limit:
            print(f"{name} {size} {layout}: not begun, --limit is over", flush=True)
            continue
        made = prepared()
        if isinstance(made, str):
            row = key | {"refused": made}
        else:
            same = {k: v for k, v in key.items() if k != "layout"} | {"identity": made.identity}
            known = (r for c, r in rows.items() if c not in old and all(r.get(k) == v for k, v in same.items()))
            row = (next(known, None) or replay(made, size, options) | {"commit": about["commit"]}) | key
        rows[case_of(key)] = row
        old.discard(case_of(key))
        print(line(row), flush=True)
        result = {"about": about, "rows": list(rows.values())}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1))
            path.with_suffix(".md").write_text(markdown(result))
    if not path:
        print(markdown({"about": about, "rows": list(rows.values())}))


def rows_of(path: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run, by their cases; of a file that is not there, none."""
    if not path or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    return {case_of(row): {"commit": earlier["about"]["commit"]} | row for row in earlier["rows"]}


def case_of(row: dict[str, Any]) -> str:
    """What was asked for: two rows of one case are one measurement and another in its place."""
    return json.dumps([row.get(name) for name in CASE])


def preparations(
    cases: Sequence[tuple[Any, ...]], options: argparse.Namespace
) -> Iterator[Callable[[], Prepared | str]]:
    """What `prepare` makes of each case, in order; with --workers in processes of their own, while others are timed."""
    if not options.workers:
        yield from (partial(prepare, *case) for case in cases)
        return
    compile_ahead(options)
    pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"))
    try:
        made = deque(pool.submit(_prepared_bytes, *case) for case in cases)
        while made:
            # Each is dropped as soon as it was used: the parts of long sequences are large.
            yield partial(_result, made.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def compile_ahead(options: argparse.Namespace) -> None:
    """Compile in processes what will be timed, and wait for it: what they run on the GPU must not be in the times."""
    if options.device == "cpu":
        return
    h, k = options.heads
    ways = ways_to_split(max(options.sizes), None, None, cost_model(options))
    heads = {(h // u, max(1, k // u)): u in ways for u in (*ways, *options.sizes) if h % u == 0}
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            (name, split): pool.submit(warm, name, split, staged, options)
            for name in options.masks
            for split, staged in heads.items()
        }
        for (name, split), job in jobs.items():
            # Nothing is lost but time: what is not in the cache is compiled when it is timed.
            if error := job.exception():
                where = [line.strip() for line in str(error.__cause__).splitlines() if "replay.py" in line]
                print(f"warm-up of {name}, {split} heads: {str(error).splitlines()[0][:120]} {where}", flush=True)


def _prepared_bytes(*case: Any) -> bytes:
    """As bytes: tensors would travel as open files, of which there may not be so many."""
    return pickle.dumps(prepare(*case))


def _result(made: Future[bytes]) -> Prepared | str:
    prepared: Prepared | str = pickle.loads(made.result())
    return prepared


def parse() -> argparse.Namespace:
    defaults = CostModel()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="ranks of the group")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--heads", type=int, nargs=2, default=[64, 8], help="query heads, key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--ranks-sampled", type=int, default=3, help="ranks replayed of each plan; 0 for all (3)")
    parser.add_argument("--repeats", type=int, default=10, help="most timed runs of each pass; at least 3 (10)")
    parser.add_argument("--backend", help="of flashmask_attention; chosen if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bandwidth", type=float, default=defaults.bandwidth, help="bytes/s each way between hosts")
    parser.add_argument("--latency", type=float, default=defaults.latency, help="seconds an exchange")
    parser.add_argument("--host-ranks", type=int, default=defaults.host_ranks, help="ranks of a host")
    parser.add_argument("--host-bandwidth", type=float, default=defaults.host_bandwidth, help="bytes/s within a host")
    parser.add_argument("--seed", type=int, help="of the packs; the most typical of 0-19 if not given")
    parser.add_argument("--limit", type=float, help="seconds after which no case is begun")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile and plan ahead (0: when timed)")
    parser.add_argument("--resume", type=Path, help="the .json of an earlier run, whose cases are taken over")
    parser.add_argument("--again", action="store_true", help="measure cases of --resume anew, in place of the old")
    parser.add_argument("--out", type=Path, help="folder for a dated .json and .md; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    return options


def describe(name: str, size: int, layout: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    cost = cost_model(options)
    asked = (name, size, layout, seed if "document" in name else None, options.tokens, list(options.heads))
    asked += (options.head_dim, str(options.dtype).removeprefix("torch."), options.ranks_sampled)
    links = (cost.bandwidth, cost.host_bandwidth, cost.host_ranks, cost.latency)
    return dict(zip(CASE, asked + links, strict=True))


def check(options: argparse.Namespace) -> None:
    """Every rank of a small plan, stage by stage on real keys, against the op on the whole sequence; or raise."""
    size, n = 4, 4 * min(256, options.tokens)
    device, d = torch.device(options.device), options.head_dim
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (
        torch.randn(1, n, h, d, generator=generator, device=device).to(options.dtype)
        for h in (options.heads[0], options.heads[1], options.heads[1])
    )
    for name in options.masks:
        mask = MASKS[name](n, 0)
        plans = [ShardPlan.build(mask, size, num_stages=stages, own_stage=own) for stages, own in ((3, 0), (2, 1))]
        expected = flashmask_attention(q, k, v, mask.to(device), backend=options.backend)
        for plan, rank in product(plans, range(size)):
            rows = plan.rows(rank).to(device)
            out = lse = None
            for stage in plan.local(rank).stages:
                if not stage.area:
                    continue
                stage = stage.to(device)
                k_s, v_s = k[:, stage.columns], v[:, stage.columns]
                backend = resolve_backend(options.backend, q, v, stage.mask.num_intervals)
                part, part_lse = attention_forward(
                    q[:, rows], k_s, v_s, stage.mask, scale=d**-0.5, backend=backend, out_dtype=torch.float32
                )
                if out is None or lse is None:
                    out, lse = part, part_lse
                else:
                    merge_(out, lse, part, part_lse)
            assert out is not None
            error = float((out - expected[:, rows].float()).abs().max())
            # Averages of v, rounded once to the dtype by one side and in float32 by the other, once a stage.
            if not error <= 4 * torch.finfo(options.dtype).eps * float(v.abs().max()):
                raise SystemExit(f"error: {name}, rank {rank} of {size} is off by {error:.3g}; no speed is shown.")


def line(row: dict[str, Any]) -> str:
    head = f"{row['mask']:16} {row['ranks']:>3} {row['layout']:10}"
    if "refused" in row:
        return f"{head} {row['refused']}"
    return (
        f"{head} u {row['head_parallel']:>2}, {row['stages']} passes  compute {row['compute_forward_tflops']:7.3g} / "
        f"{row['compute_backward_tflops']:7.3g}  with exchange {row['total_forward_tflops']:7.3g} / "
        f"{row['total_backward_tflops']:7.3g} TFLOP/s  ({row['seconds']:.1f} s)"
    )


def markdown(result: dict[str, Any]) -> str:
    about = result["about"]
    order = list(MASKS), list(LAYOUTS)
    rows = sorted(result["rows"], key=lambda r: (order[0].index(r["mask"]), r["ranks"], order[1].index(r["layout"])))
    commits = Counter((row["commit"], row["mask"]) for row in rows if "commit" in row)
    text = [
        f"# Context parallelism, replayed on one device ({about['date']})",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        *(f"- {shape}" for shape in dict.fromkeys(shape_of(row) for row in rows)),
        *(f"- at commit {commit}: {count} rows of {mask}" for (commit, mask), count in commits.items()),
        "",
        "Compute is measured; the exchange is modelled from exact bytes and the stated links, overlapped as the "
        "executor does. TFLOP/s a GPU, forward / backward, by the slowest of the ranks replayed. Where heads are "
        "split, the trade of rows for heads is in the figures with exchange: its packing measured, its way modelled.",
        "",
        "| mask | ranks | layout | rings x heads | imbalance | received | passes | compute | "
        "with exchange (modelled) | replayed | MagiAttention, published |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        cells = [row["mask"], str(row["ranks"]), row["layout"]]
        if "refused" in row:
            cells += [row["refused"]] + [""] * 7
        else:
            quoted = PUBLISHED.get(row["mask"], {}).get(row["ranks"])
            cells += [
                f"{row['ranks'] // row['head_parallel']} x {row['head_parallel']}",
                f"{row['imbalance']:.3f}",
                f"{row['received']:.3f}",
                str(row["stages"]),
                f"{row['compute_forward_tflops']:.3g} / {row['compute_backward_tflops']:.3g}",
                f"{row['total_forward_tflops']:.3g} / {row['total_backward_tflops']:.3g}",
                f"{len(row['replayed'])} of {row['ranks']}" if row["layout"] != "ulysses" else "1, all are alike",
                f"{quoted[0]} / {quoted[1]}" if quoted and row["layout"] == "balanced" else "",
            ]
        text.append("| " + " | ".join(cells) + " |")
    text += verdicts(rows)
    text += ["", _OF_MAGI]
    return "\n".join(text) + "\n"


_OF_MAGI = (
    "MagiAttention's figures are its own: measured on H100s, 8K tokens a GPU, 64:8 heads of 128, bfloat16; its packs, "
    "of another length mix, with no sample above a quarter of the sequence; NVLink within hosts and RDMA between them, "
    "with its kernels for both, at bandwidths that it does not state."
)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """How packed causal documents stand to the targets: compute that scales, and totals ahead of what is published."""
    text = []
    for layout in ("balanced", "keys"):
        found = {row["ranks"]: row for row in rows if (row["mask"], row["layout"]) == ("causal_document", layout)}
        if 8 in found and 64 in found:
            kept = found[64]["compute_forward_tflops"] / found[8]["compute_forward_tflops"]
            text += ["", f"`{layout}`: forward compute a GPU at 64 ranks is {kept:.0%} of that at 8 (target: 85%)."]
    found = {row["ranks"]: row for row in rows if (row["mask"], row["layout"]) == ("causal_document", "balanced")}
    for size, (forward, backward) in PUBLISHED["causal_document"].items():
        if size in found:
            ours = found[size]["total_forward_tflops"], found[size]["total_backward_tflops"]
            text += [
                "",
                f"{size} ranks, packed causal documents: {ours[0]:.0f} / {ours[1]:.0f} modelled in all, {forward} / "
                f"{backward} published: {ours[0] / forward:.2f} and {ours[1] / backward:.2f} times.",
            ]
    return text


def shape_of(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens_a_rank']} tokens a rank, {row['heads'][0]}:{row['heads'][1]} heads of {row['head_dim']}, "
        f"{row['dtype']}; link {row['bandwidth']:.3g} bytes/s between hosts of {row['host_ranks']} ranks, "
        f"{row['host_bandwidth']:.3g} within them, {1e6 * row['latency']:.0f} us an exchange"
    )


if __name__ == "__main__":
    main()
