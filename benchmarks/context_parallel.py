"""What a rank of a context-parallel group computes, measured on one GPU, and with a stated link the time of the group.

    python -m benchmarks.context_parallel
    python -m benchmarks.context_parallel --sizes 8 64 --masks causal_document --ranks-sampled 0 --limit 200
    python -m benchmarks.context_parallel --device cpu --tokens 64 --heads 4 2 --head-dim 16 --dtype float32 --sizes 2 4

Replays ranks of a plan one after the other, with random inputs of the right shapes. Measured, as the executor does it:
packing the keys that a stage sends, the attention to those that it receives, the merge; in the backward the gradients
of each stage, packing those that go back, and adding those that return. Modelled: the exchange, from the exact bytes of
each stage and the link, overlapped as the executor overlaps it: --bandwidth and --latency of `CostModel` between hosts,
--host-bandwidth for groups of at most --host-ranks, which share an NVLink domain. No figure here is of several GPUs.

Layouts: `balanced` and `zigzag` are plans; `all_gather` is the zigzag with all keys gathered before one attention;
`ulysses` splits heads over all ranks, and its trade of rows for heads is modelled whole. Where the balanced plan is the
zigzag, the zigzag is not measured again. TFLOP/s a GPU count the mask's area over all ranks, by the slowest rank that
was replayed: forward 4 D FLOPs a score and head, backward 2.5 times that. With --ranks-sampled those are the ranks that
the cost model calls the busiest, the median and the lightest ones.

Packs are of benchmarks/packs.py, the seed of median causal area among 0-19, since a pack's area varies several times
over; --seed names another. A check against the op on the whole sequence comes first. Results are added to --out after
every case, and cases that are in it already are not run again; no case is begun after --limit seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.packs import pack, typical_seed
from benchmarks.timing import Timer
from fm_longctx import ShardPlan, flashmask_attention
from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward, resolve_backend
from fm_longctx.context_parallel.cost import CostModel, backward_timeline, forward_timeline
from fm_longctx.context_parallel.exchange import add_gradients_
from fm_longctx.context_parallel.exchange import pack as pack_keys
from fm_longctx.context_parallel.merge import merge_
from fm_longctx.context_parallel.stages import Stage
from fm_longctx.mask import FlashMask, builders

MASKS: dict[str, Callable[[int, int], FlashMask]] = {
    "causal_document": lambda n, seed: builders.causal_document(pack(n, seed)),
    "document": lambda n, seed: builders.document(pack(n, seed)),
    "sliding_window": lambda n, _: builders.sliding_window(n, min(1024, n)),
    "causal": lambda n, _: builders.causal(n),
    "full": lambda n, _: builders.full(n),
}
LAYOUTS = ("balanced", "zigzag", "all_gather", "ulysses")

# TFLOP/s a GPU with the exchange, H100, 64:8 heads of 128, bfloat16, 8K tokens a GPU, packs of another draw than ours:
# what MagiAttention publishes.
PUBLISHED = {
    "causal_document": {8: (459, 361), 16: (427, 372), 32: (316, 334), 64: (239, 265)},
    "causal": {8: (645, 530), 64: (594, 529)},
}


def main() -> None:
    options, begin = parse(), time.monotonic()
    check(options)
    about = environment(options.commit)
    result: dict[str, Any] = {"about": about, "rows": []}
    path = options.out and options.out / f"{about['date']}-context_parallel.json"
    if path and path.exists():
        result["rows"] = json.loads(path.read_text())["rows"]
    for name in options.masks:
        for size in options.sizes:
            n = options.tokens * size
            seed = typical_seed(n) if options.seed is None else options.seed
            measured: dict[Any, dict[str, Any]] = {}
            for layout in options.layouts:
                key = describe(name, size, layout, seed, options)
                if any(all(row[k] == v for k, v in key.items()) for row in result["rows"]):
                    continue
                if options.limit and time.monotonic() - begin > options.limit:
                    print(f"{name} {size} {layout}: not begun, --limit is over", flush=True)
                    continue
                row = key | replay(MASKS[name](n, seed), size, layout, options, measured)
                result["rows"].append(row)
                print(line(row), flush=True)
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(result, indent=1))
                    path.with_suffix(".md").write_text(markdown(result))
    if not path:
        print(markdown(result))


def link(size: int, options: argparse.Namespace) -> CostModel:
    """The cost model of a group of so many ranks."""
    return CostModel(
        heads=options.heads[0],
        kv_heads=options.heads[1],
        head_dim=options.head_dim,
        element_bytes=torch.empty(0, dtype=options.dtype).element_size(),
        bandwidth=options.host_bandwidth if size <= options.host_ranks else options.bandwidth,
        latency=options.latency,
    )


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
    parser.add_argument("--bandwidth", type=float, default=defaults.bandwidth, help="bytes/s each way, a rank")
    parser.add_argument("--latency", type=float, default=defaults.latency, help="seconds an exchange")
    parser.add_argument("--host-ranks", type=int, default=8, help="ranks that share an NVLink domain")
    parser.add_argument("--host-bandwidth", type=float, default=3e11, help="bytes/s each way inside it, a rank")
    parser.add_argument("--seed", type=int, help="of the packs; the most typical of 0-19 if not given")
    parser.add_argument("--limit", type=float, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="folder for a dated .json and .md; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    return options


def describe(name: str, size: int, layout: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    cost = link(size, options)
    return {
        "mask": name,
        "ranks": size,
        "layout": layout,
        "seed": seed if "document" in name else None,
        "tokens_a_rank": options.tokens,
        "heads": list(options.heads),
        "head_dim": options.head_dim,
        "dtype": str(options.dtype).removeprefix("torch."),
        "ranks_sampled": options.ranks_sampled,
        "bandwidth": cost.bandwidth,
        "latency": cost.latency,
    }


def replay(
    mask: FlashMask, size: int, layout: str, options: argparse.Namespace, measured: dict[Any, dict[str, Any]]
) -> dict[str, Any]:
    """Measured and modelled seconds, and rates, of one layout. `measured` holds those of plans that were replayed."""
    scores = float(mask.area().sum())
    begin, cost, heads = time.perf_counter(), link(size, options), (options.heads[0], options.heads[1])
    if layout == "ulysses":
        if heads[0] % size:
            return {"refused": f"{size} ranks do not divide {heads[0]} query heads"}
        ranks = [0]
        heads = (heads[0] // size, max(1, heads[1] // size))
        forward, backward = (np.array([t]) for t in measure([whole(mask)], heads, options))
        trade = cost.trade_heads(np.array([float(options.tokens)]), size)
        totals = forward[:, 0] + trade, backward[:, 0] + trade
        received, imbalance, stages = 0.0, 1.0, 1
    else:
        plan = ShardPlan.build(mask, size, strategy="balanced" if layout == "balanced" else "zigzag", cost=cost)
        if layout != "all_gather" and plan.fingerprint() in measured:
            return measured[plan.fingerprint()] | {"seconds": time.perf_counter() - begin}
        ranks = sampled(plan, options.ranks_sampled)
        imbalance = plan.imbalance
        if layout == "all_gather":
            times = [measure([whole(mask.select(plan.rows(rank)))], heads, options) for rank in ranks]
            forward, backward = (np.array([list(t[i]) for t in times]) for i in (0, 1))
            elsewhere = np.array([float(mask.num_columns - len(plan.rows(rank))) for rank in ranks])
            totals = (
                forward[:, 0] + cost.transfer(elsewhere * cost.forward_key_bytes),
                backward[:, 0] + cost.transfer(elsewhere * cost.backward_key_bytes),
            )
            received, stages = 1.0, 1
        else:
            parts = [plan.local(rank).stages for rank in ranks]
            times = [measure(part, heads, options) for part in parts]
            forward, backward = (np.array([list(t[i]) for t in times]) for i in (0, 1))
            keys = np.array([[float(max(sum(s.receive_counts), sum(s.send_counts))) for s in part] for part in parts])
            totals = (
                forward_timeline(forward, cost.transfer(keys * cost.forward_key_bytes)).total,
                backward_timeline(backward, cost.transfer(keys * cost.backward_key_bytes)).total,
            )
            received, stages = plan.received_fraction, plan.num_stages
    flops = 4.0 * options.head_dim * options.heads[0] * scores / size

    def rates(seconds: float, factor: float) -> float:
        return factor * flops / seconds / 1e12

    row = {
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
    if layout in ("balanced", "zigzag"):
        measured[plan.fingerprint()] = row
    return row


def whole(mask: FlashMask) -> Stage:
    """Attention to all columns at once, of which nothing is exchanged."""
    none = torch.zeros(0, dtype=torch.int64)
    area = int(mask.area().sum())
    return Stage(
        mask=mask,
        columns=none,
        receive_counts=(),
        send_counts=(),
        send_rows=none,
        return_rows=none,
        return_order=none,
        area=area,
    )


def sampled(plan: ShardPlan, count: int) -> list[int]:
    """Ranks by modelled time, busiest first, as evenly spread as so many can be; all of them for 0."""
    time_of = plan.report().forward.total
    order = np.argsort(-time_of, kind="stable")
    if not 0 < count < len(order):
        return order.tolist()
    return order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist()


def measure(
    stages: Sequence[Stage], heads: tuple[int, int], options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of each stage, forward and backward, with all that the executor does for it but the exchange."""
    device, d = torch.device(options.device), options.head_dim
    generator = torch.Generator(device).manual_seed(0)
    # Each run after a flush of the L2: keys come from the network. The host's own time is hidden behind it.
    timer = Timer(options.device, budget_ms=15.0, most=max(3, options.repeats))
    staged = len(stages) > 1

    def random(n: int, h: int) -> Tensor:
        return torch.randn(1, n, h, d, generator=generator, device=device).to(options.dtype)

    def seconds(work: Callable[[], Any]) -> float:
        return timer(work).ms / 1e3

    rows = stages[0].mask.num_rows
    q, dout = random(rows, heads[0]), random(rows, heads[0])
    exact = torch.float32 if staged else options.dtype
    forward, backward = [0.0] * len(stages), [0.0] * len(stages)
    own = pack_keys(random(rows, heads[1]), random(rows, heads[1])) if staged else None
    out = lse = None
    attended: list[tuple[int, Callable[[], Any]]] = []
    stages = [stage.to(device) for stage in stages]
    for i, stage in enumerate(stages):
        if own is not None and i:
            forward[i] += seconds(partial(own.index_select, 0, stage.send_rows))
        if not stage.area:
            continue
        k, v = random(stage.mask.num_columns, heads[1]), random(stage.mask.num_columns, heads[1])
        backend = resolve_backend(options.backend, q, v, stage.mask.num_intervals)
        common: dict[str, Any] = dict(scale=d**-0.5, backend=backend)
        attend = partial(attention_forward, q, k, v, stage.mask, out_dtype=exact, **common)
        part, part_lse = attend()
        forward[i] += seconds(attend)
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            # Merging again and again changes the values and not the work.
            forward[i] += seconds(partial(merge_, out, lse, part, part_lse))
        attended.append((i, partial(_backward, dout, q, k, v, stage.mask, grad_dtype=exact, **common)))
    if out is None or lse is None:
        return forward, backward
    delta = attention_delta(out.to(q.dtype), dout, backend=backend)
    dq = torch.zeros_like(q, dtype=exact)
    for n, (i, differentiate) in enumerate(attended):
        dq_s, dk, dv = differentiate(lse, delta)
        backward[i] += seconds(partial(differentiate, lse, delta))
        if n:
            backward[i] += seconds(partial(dq.add_, dq_s))
        if i:
            backward[i] += seconds(partial(pack_keys, dk, dv))
    if own is not None:
        total = torch.zeros_like(own, dtype=exact)
        for stage in stages[1:]:
            returned = total.new_zeros(len(stage.send_rows), *total.shape[1:])
            # Gradients come back at the end, when the rank's own keys are done.
            backward[0] += seconds(partial(add_gradients_, total, stage, returned))
    return forward, backward


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: FlashMask, lse: Tensor, delta: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(dout, q, k, v, lse, delta, mask, **options)


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
        plan = ShardPlan.build(mask, size, num_stages=3)
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
            # Averages of v, rounded once to the dtype by one side and in float32 by the other, once a stage.
            if not error <= 4 * torch.finfo(options.dtype).eps * float(v.abs().max()):
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
        "| mask | ranks | layout | link, bytes/s | imbalance | received | stages | compute | "
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
                f"{row['bandwidth']:.3g}",
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
    text += ["", "MagiAttention's figures are its own (H100, 8K tokens a GPU, 64:8 heads of 128, bfloat16, its packs)."]
    return "\n".join(text) + "\n"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """How packed causal documents stand to the targets: compute that scales, and totals ahead of what is published."""
    found = {row["ranks"]: row for row in rows if (row["mask"], row["layout"]) == ("causal_document", "balanced")}
    text = []
    if 8 in found and 64 in found:
        kept = found[64]["compute_forward_tflops"] / found[8]["compute_forward_tflops"]
        text += ["", f"Forward compute a GPU at 64 ranks is {kept:.0%} of that at 8 (target: 85%)."]
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
        f"{row['dtype']}"
    )


if __name__ == "__main__":
    main()
