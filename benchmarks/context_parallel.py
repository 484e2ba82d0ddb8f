"""What a rank of a context-parallel group computes, measured on one GPU, and with a stated link the time of the group.

    python -m benchmarks.context_parallel
    python -m benchmarks.context_parallel --sizes 8 64 --masks causal_document --ranks-sampled 3
    python -m benchmarks.context_parallel --device cpu --tokens 64 --heads 4 2 --head-dim 16 --dtype float32 --sizes 2 4

Replays ranks of a plan one after the other: the attention to each stage's keys, the merging, and the backward, with
random inputs of the right shapes. Measured: the seconds of each. Modelled: the exchange, from the exact bytes of each
stage and the link of `CostModel` (--bandwidth, --latency), overlapped as the executor overlaps it. No figure here is of
several GPUs.

Layouts: `balanced` and `zigzag` are plans; `all_gather` is the zigzag with all keys gathered before one attention;
`ulysses` splits heads over all ranks. TFLOP/s a GPU count the mask's area over all ranks, by the slowest rank that was
replayed: forward 4 D FLOPs a score and head, backward 2.5 times that. With --ranks-sampled those are the ranks that the
cost model calls the busiest, the median and the lightest ones.

A check against the op on the whole sequence comes first. Results are added to --out after every case, and cases that
are in it already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.packs import pack
from fm_longctx import ShardPlan, flashmask_attention
from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward, resolve_backend
from fm_longctx.context_parallel.cost import CostModel, backward_timeline, forward_timeline
from fm_longctx.context_parallel.layout import stage_tables
from fm_longctx.context_parallel.merge import merge_
from fm_longctx.mask import FlashMask, builders

MASKS: dict[str, Callable[[int], FlashMask]] = {
    "causal_document": lambda n: builders.causal_document(pack(n, seed=0)),
    "document": lambda n: builders.document(pack(n, seed=0)),
    "causal": builders.causal,
    "full": builders.full,
    "sliding_window": lambda n: builders.sliding_window(n, min(1024, n)),
}
LAYOUTS = ("balanced", "zigzag", "all_gather", "ulysses")

# TFLOP/s a GPU with the exchange, H100, 64:8 heads of 128, bfloat16, 8K tokens a GPU, packs of another draw than ours:
# what MagiAttention publishes.
PUBLISHED = {
    "causal_document": {8: (459, 361), 16: (427, 372), 32: (316, 334), 64: (239, 265)},
    "causal": {8: (645, 530), 64: (594, 529)},
}


def main() -> None:
    options = parse()
    cost = CostModel(
        heads=options.heads[0],
        kv_heads=options.heads[1],
        head_dim=options.head_dim,
        element_bytes=torch.empty(0, dtype=options.dtype).element_size(),
        bandwidth=options.bandwidth,
        latency=options.latency,
    )
    check(options)
    about = environment(options.commit)
    result: dict[str, Any] = {"about": about, "rows": []}
    path = options.out and options.out / f"{about['date']}-context_parallel.json"
    if path and path.exists():
        result["rows"] = json.loads(path.read_text())["rows"]
    for name in options.masks:
        for size in options.sizes:
            for layout in options.layouts:
                key = describe(name, size, layout, options, cost)
                if any(all(row[k] == v for k, v in key.items()) for row in result["rows"]):
                    continue
                row = key | replay(MASKS[name](options.tokens * size), size, layout, options, cost)
                result["rows"].append(row)
                print(line(row), flush=True)
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(result, indent=1))
                    path.with_suffix(".md").write_text(markdown(result))
    if not path:
        print(markdown(result))


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
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each pass; the median counts (3)")
    parser.add_argument("--backend", help="of flashmask_attention; chosen if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bandwidth", type=float, default=defaults.bandwidth, help="bytes/s each way, a rank")
    parser.add_argument("--latency", type=float, default=defaults.latency, help="seconds an exchange")
    parser.add_argument("--out", type=Path, help="folder for a dated .json and .md; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    return options


def describe(name: str, size: int, layout: str, options: argparse.Namespace, cost: CostModel) -> dict[str, Any]:
    return {
        "mask": name,
        "ranks": size,
        "layout": layout,
        "tokens_a_rank": options.tokens,
        "heads": list(options.heads),
        "head_dim": options.head_dim,
        "dtype": str(options.dtype).removeprefix("torch."),
        "ranks_sampled": options.ranks_sampled,
        "bandwidth": cost.bandwidth,
        "latency": cost.latency,
    }


def replay(mask: FlashMask, size: int, layout: str, options: argparse.Namespace, cost: CostModel) -> dict[str, Any]:
    """Measured and modelled seconds, and rates, of one layout."""
    scores = float(mask.area().sum())
    begin = time.perf_counter()
    if layout == "ulysses":
        if options.heads[0] % size:
            return {"refused": f"{size} ranks do not divide {options.heads[0]} query heads"}
        heads = (options.heads[0] // size, max(1, options.heads[1] // size))
        ranks = [0]
        forward, backward = (np.array([[t]]) for t in measure([(mask, mask.num_rows)], heads, options)[:2])
        trade = cost.trade_heads(np.array([float(options.tokens)]), size)
        totals = forward[:, 0] + trade, backward[:, 0] + trade
        received, imbalance, stages = 0.0, 1.0, 1
    else:
        plan = ShardPlan.build(mask, size, strategy="balanced" if layout == "balanced" else "zigzag", cost=cost)
        ranks = sampled(plan, options.ranks_sampled)
        times = []
        for rank in ranks:
            if layout == "all_gather":
                parts = [(mask.select(plan.rows(rank)), mask.num_columns)]
            else:
                parts = [(stage.mask, len(stage.columns)) for stage in plan.local(rank).stages]
            times.append(measure(parts, tuple(options.heads), options))
        forward, backward = (np.array([list(t[i]) for t in times]) for i in (0, 1))
        if layout == "all_gather":
            elsewhere = np.array([float(mask.num_columns - len(plan.rows(rank))) for rank in ranks])
            totals = (
                forward[:, 0] + cost.transfer(elsewhere * cost.forward_key_bytes),
                backward[:, 0] + cost.transfer(elsewhere * cost.backward_key_bytes),
            )
            received = 1.0
        else:
            keys = plan.tables[0][1].astype(np.float64)
            np.fill_diagonal(keys, 0)
            keys = stage_tables(keys, keys, plan.num_stages)[1][ranks]
            totals = (
                forward_timeline(forward, cost.transfer(keys * cost.forward_key_bytes)).total,
                backward_timeline(backward, cost.transfer(keys * cost.backward_key_bytes)).total,
            )
            received = plan.received_fraction
        imbalance, stages = plan.imbalance, plan.num_stages
    flops = 4.0 * options.head_dim * options.heads[0] * scores / size

    def rates(seconds: float, factor: float) -> float:
        return factor * flops / seconds / 1e12

    return {
        "replayed": ranks,
        "imbalance": imbalance,
        "received": received,
        "stages": stages,
        "flops_a_rank": flops,
        "measured_forward_seconds": forward.tolist(),
        "measured_backward_seconds": backward.tolist(),
        "modelled_forward_seconds": totals[0].tolist(),
        "modelled_backward_seconds": totals[1].tolist(),
        "compute_forward_tflops": rates(float(forward.sum(1).max()), 1.0),
        "compute_backward_tflops": rates(float(backward.sum(1).max()), 2.5),
        "total_forward_tflops": rates(float(totals[0].max()), 1.0),
        "total_backward_tflops": rates(float(totals[1].max()), 2.5),
        "seconds": time.perf_counter() - begin,
    }


def sampled(plan: ShardPlan, count: int) -> list[int]:
    """Ranks by modelled time, busiest first, as evenly spread as so many can be; all of them for 0."""
    time_of = plan.report().forward.total
    order = np.argsort(-time_of, kind="stable")
    if not 0 < count < len(order):
        return order.tolist()
    return order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist()


def measure(
    parts: list[tuple[FlashMask, int]], heads: tuple[int, ...], options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of forward (with merging) and backward of each part: its mask, and how many keys it has."""
    device, d = torch.device(options.device), options.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def random(n: int, h: int) -> Tensor:
        return torch.randn(1, n, h, d, generator=generator, device=device).to(options.dtype)

    rows = parts[0][0].num_rows
    q, dout = random(rows, heads[0]), random(rows, heads[0])
    scale = d**-0.5
    forward, backward = [0.0] * len(parts), [0.0] * len(parts)
    out = lse = None
    whole = []
    for i, (mask, n) in enumerate(parts):
        if not int(mask.area().sum()):
            continue
        mask, k, v = mask.to(device), random(n, heads[1]), random(n, heads[1])
        backend = resolve_backend(options.backend, q, v, mask.num_intervals)

        def attend(mask: FlashMask = mask, k: Tensor = k, v: Tensor = v, backend: str = backend) -> Any:
            exact = torch.float32 if len(parts) > 1 else q.dtype
            return attention_forward(q, k, v, mask, scale=scale, backend=backend, out_dtype=exact)

        part, part_lse = attend()
        forward[i] = median_seconds(attend, options)
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            forward[i] += median_seconds(partial(merge_, out, lse, part, part_lse), options)
        whole.append((i, mask, k, v, backend))
    if out is None or lse is None:
        return forward, backward
    delta = attention_delta(out.to(q.dtype), dout, backend=backend)
    for i, mask, k, v, backend in whole:

        def differentiate(mask: FlashMask = mask, k: Tensor = k, v: Tensor = v, backend: str = backend) -> Any:
            exact = torch.float32 if len(parts) > 1 else q.dtype
            return attention_backward(dout, q, k, v, lse, delta, mask, scale=scale, backend=backend, grad_dtype=exact)

        backward[i] = median_seconds(differentiate, options)
    return forward, backward


def median_seconds(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """Median of the timed runs after one that compiles and builds what is cached; on a GPU by its events."""
    work()
    times = []
    for _ in range(options.repeats):
        if options.device == "cpu":
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


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
        mask = MASKS[name](n)
        plan = ShardPlan.build(mask, size)
        expected = flashmask_attention(q, k, v, mask.to(device), backend=options.backend)
        for rank in range(size):
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
            # Both are rounded once to the dtype, at values of about 1.
            if not error <= 4 * torch.finfo(options.dtype).eps * float(expected.abs().max()):
                raise SystemExit(f"error: {name}, rank {rank} of {size} is off by {error:.3g}; no speed is shown.")


def line(row: dict[str, Any]) -> str:
    head = f"{row['mask']:16} {row['ranks']:>3} {row['layout']:10}"
    if "refused" in row:
        return f"{head} {row['refused']}"
    return (
        f"{head} compute {row['compute_forward_tflops']:7.3g} / {row['compute_backward_tflops']:7.3g}  with exchange "
        f"{row['total_forward_tflops']:7.3g} / {row['total_backward_tflops']:7.3g} TFLOP/s  ({row['seconds']:.1f} s)"
    )


def markdown(result: dict[str, Any]) -> str:
    about = result["about"]
    rows = result["rows"]
    first = shape_of(rows[0]) if rows else ""
    text = [
        f"# Context parallelism, replayed on one device ({about['date']})",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        f"- {first}",
        "",
        "Compute is measured; the exchange is modelled from exact bytes and the stated link, overlapped as the "
        "executor does. TFLOP/s a GPU, forward / backward, by the slowest of the ranks replayed.",
        "",
        "| mask | ranks | layout | imbalance | received | stages | compute | with exchange (modelled) | replayed | "
        "MagiAttention, published |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["mask"], str(row["ranks"]), row["layout"]]
        if "refused" in row:
            cells += [row["refused"]] + [""] * 6
        else:
            quoted = PUBLISHED.get(row["mask"], {}).get(row["ranks"])
            cells += [
                f"{row['imbalance']:.3f}",
                f"{row['received']:.3f}",
                str(row["stages"]),
                f"{row['compute_forward_tflops']:.3g} / {row['compute_backward_tflops']:.3g}",
                f"{row['total_forward_tflops']:.3g} / {row['total_backward_tflops']:.3g}",
                f"{len(row['replayed'])} of {row['ranks']}" if row["layout"] != "ulysses" else "1, all are alike",
                f"{quoted[0]} / {quoted[1]}" if quoted and row["layout"] == "balanced" else "",
            ]
        text.append("| " + " | ".join(cells) + " |")
    text += ["", "MagiAttention's figures are its own (H100, 8K tokens a GPU, 64:8 heads of 128, bfloat16, its packs)."]
    return "\n".join(text) + "\n"


def shape_of(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens_a_rank']} tokens a rank, {row['heads'][0]}:{row['heads'][1]} heads of {row['head_dim']}, "
        f"{row['dtype']}; link {row['bandwidth']:.3g} bytes/s and {row['latency']:.3g} s"
    )


if __name__ == "__main__":
    main()
