"""Context-parallel attention on several ranks with the real kernels, against one process.

    torchrun --nproc-per-node 4 -m benchmarks.context_parallel_ranks --transport gloo      # 2-4 ranks share one GPU
    torchrun --nproc-per-node 8 -m benchmarks.context_parallel_ranks --transport nccl      # one GPU each
    torchrun --nproc-per-node 2 -m benchmarks.context_parallel_ranks --device cpu --transport gloo --tokens 64

gloo moves GPU tensors through the host: correctness only, and no times are printed (--time prints them all the same, of
a transport that is not for speed). NCCL does not let ranks share a GPU. Every case is checked on rank 0 against
`flashmask_attention` on the whole sequence, output and the gradients of q, k and v; a wrong one shows no speed, and the
exit code is 1. A case is a mask, a number of ranks that split heads (rings of neighbours, within a host), and the stage
in which a rank's own keys are attended to; `auto` leaves both to the cost model, told these heads and this host. On a
GPU each case's part of the plan is copied on a stream of its own while the case before is computed, as a loader does.

Over NCCL each case is timed as well, at --time-tokens a rank and --time-heads: forward and backward, by the slowest
rank, median of --repeats; the same with its collectives left out, which is what attention alone takes; and its
all-to-alls alone, with the bytes of the busiest rank. What the collectives add to attention is the exposed exchange.
Counted are the times that rank 0's host waited for its GPU in a first step, the schedules' making included.

An error may be at most twice that of the op itself against higher precision, plus one rounding to the dtype and 16 to
float32, of the largest value.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.packs import typical_seed
from benchmarks.replay import MASKS
from fm_longctx import ContextParallel, ShardPlan, context_parallel_attention, flashmask_attention
from fm_longctx.context_parallel.ahead import Ahead
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.exchange import start_keys
from fm_longctx.mask import FlashMask, builders

PARTS = ("out", "dq", "dk", "dv")


def main() -> int:
    options = parse()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(options.device)
    if device.type == "cuda":
        # Over gloo all ranks may share the first GPU.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(options.transport, timeout=datetime.timedelta(seconds=options.timeout))
    rows, wrong = [], 0
    asked = layouts(size, options)
    cases = (Case(n, options.tokens, options.heads, layout, device, options) for n in options.masks for layout in asked)
    case = next(cases, None)
    while case is not None:
        shards = case.backward(*case.forward())
        # Made, and its copy begun, while the GPU is busy with the present one.
        following = next(cases, None)
        row = judge(case, shards, device)
        del shards
        if row["ok"] and options.time and options.time_heads[0] % case.plan.head_parallel == 0:
            timed = Case(case.name, options.time_tokens, options.time_heads, case.layout, device, options)
            row["timed"] = describe(timed) | timing(timed, device)
            del timed
        rows.append(row)
        wrong += not row["ok"]
        if rank == 0:
            print(json.dumps(row), flush=True)
        case = following
    if rank == 0 and options.out:
        about = environment(options.commit)
        path = options.out / f"{about['date']}-context_parallel_ranks-{options.transport}-{size}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in [about, *rows]))
    dist.destroy_process_group()
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=["gloo", "nccl"], required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a rank")
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 2], help="query heads, key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--masks", nargs="+", choices=[*MASKS, "prefix_tree"], default=[*MASKS, "prefix_tree"])
    parser.add_argument(
        "--head-parallel",
        type=lambda text: text if text == "auto" else int(text),
        nargs="+",
        default=[1, 2, "auto"],
        help="numbers, of which those that divide the ranks are run, or auto",
    )
    parser.add_argument(
        "--own-stage", type=int, nargs="+", choices=[0, 1], default=[0, 1], help="each, but where `auto` chooses"
    )
    parser.add_argument("--stages", type=int, help="chosen by the cost model if not given")
    parser.add_argument("--host-ranks", type=int, help="ranks of a host, as the cost model is told; those there are")
    parser.add_argument("--bandwidth", type=float, default=CostModel().bandwidth, help="bytes/s between such hosts")
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, help="time each case (over NCCL)")
    parser.add_argument("--time-tokens", type=int, default=8192, help="tokens a rank of the timed runs")
    parser.add_argument("--time-heads", type=int, nargs=2, default=[64, 8], help="heads of the timed runs")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs")
    parser.add_argument("--backend", help="of flashmask_attention; chosen if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--timeout", type=int, default=120, help="seconds a collective may wait for a rank")
    parser.add_argument("--out", type=Path, help="folder for a dated .jsonl; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    if options.time is None:
        options.time = options.transport == "nccl"
    return options


def mask_of(name: str, n: int) -> FlashMask:
    if name != "prefix_tree":
        return MASKS[name](n, typical_seed(n))
    # A prompt of half the tokens with two branches, the first of which branches again.
    lengths = [n // 2, n // 8, n // 8, n // 8]
    return builders.prefix_tree([-1, 0, 1, 1, 0], [*lengths, n - sum(lengths)])


class Layout(NamedTuple):
    """How a case spreads its sequence; `auto` and None leave it to the cost model."""

    head_parallel: int | Literal["auto"]
    own_stage: int | None


def layouts(size: int, options: argparse.Namespace) -> list[Layout]:
    """Those asked for that so many ranks and these heads allow."""
    found: list[Layout] = []
    for ways in options.head_parallel:
        if ways == "auto":
            found.append(Layout("auto", None))
        elif size % ways == 0 and options.heads[0] % ways == 0:
            # One ring waits for no keys.
            found += [Layout(ways, own) for own in (options.own_stage if size > ways else [None])]
    return found


class Case:
    """A mask on all ranks: its plan, this rank's part of it on its way to the device, and of inputs that all ranks make
    alike."""

    def __init__(
        self, name: str, tokens: int, heads: list[int], layout: Layout, device: torch.device, options: Any
    ) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self.name, self.heads, self.layout, self.options = name, heads, layout, options
        self.mask = mask_of(name, size * tokens)
        rings = 0 if layout.head_parallel == "auto" else size // layout.head_parallel
        self.plan = ShardPlan.build(
            self.mask,
            size,
            head_parallel=layout.head_parallel,
            own_stage=layout.own_stage,
            num_stages=min(options.stages, rings) if options.stages and rings else None,
            cost=CostModel(
                heads=heads[0],
                kv_heads=heads[1],
                head_dim=options.head_dim,
                element_bytes=options.dtype.itemsize,
                bandwidth=options.bandwidth,
                host_ranks=options.host_ranks or int(os.environ["LOCAL_WORLD_SIZE"]),
            ),
        )
        part = self.plan.local(rank)
        self.coming = Ahead(part, device) if device.type == "cuda" else None
        self.context = None if self.coming else ContextParallel(dist.group.WORLD, part, device=device)
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = tuple(
            torch.randn(1, self.mask.num_rows, h, options.head_dim, generator=generator, device=device).to(
                options.dtype
            )
            for h in (heads[0], heads[1], heads[1], heads[0])
        )
        self.mine = [self.plan.shard(x, rank, 1) for x in self.inputs]

    def opened(self) -> ContextParallel:
        """The context, made at its first use, of what was copied ahead."""
        if self.context is None:
            assert self.coming is not None
            self.context = ContextParallel(dist.group.WORLD, self.coming.take(), device=self.coming.device)
        return self.context

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in self.mine[:3]]
        return context_parallel_attention(*leaves, self.opened(), backend=self.options.backend), leaves

    def backward(self, out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        out.backward(self.mine[3])
        return [out.detach(), *(x.grad for x in leaves)]


def judge(case: Case, shards: list[Tensor], device: torch.device) -> dict[str, Any]:
    """What a case is, and its errors over their budgets."""
    options = case.options
    return {
        "mask": case.name,
        "ranks": case.plan.world_size,
        "head_parallel": case.plan.head_parallel,
        "own_stage": case.plan.own_stage,
        "chosen": case.layout.head_parallel == "auto",
        "copied_ahead": case.coming is not None,
        "transport": options.transport,
        "dtype": str(options.dtype).removeprefix("torch."),
        "head_dim": options.head_dim,
        "checked": describe(case),
        **compare(case.plan, shards, case.inputs, case.mask.to(device), options),
    }


def describe(case: Case) -> dict[str, Any]:
    plan = case.plan
    return {
        "tokens": plan.num_tokens,
        "heads": list(case.heads),
        "head_parallel": plan.head_parallel,
        "stages": plan.num_stages,
        "own_stage": plan.own_stage,
        "imbalance": plan.imbalance,
        "received": plan.received_fraction,
    }


def compare(
    plan: ShardPlan, shards: list[Tensor], inputs: tuple[Tensor, ...], mask: FlashMask, options: argparse.Namespace
) -> dict[str, Any]:
    """Worst error of each part over its budget, on rank 0, told to all."""
    parts: list[list[Tensor]] = []
    for shard in shards:
        everyone: list[Any] = [None] * plan.world_size
        dist.all_gather_object(everyone, shard.cpu())
        parts.append(everyone)
    verdict: list[Any] = [None]
    if dist.get_rank() == 0:
        higher = torch.float64 if options.dtype == torch.float32 else torch.float32
        exact = whole(inputs, mask, higher, options)
        plain = whole(inputs, mask, options.dtype, options)
        verdict[0] = {}
        for name, everyone, want, low in zip(PARTS, parts, exact, plain, strict=True):
            got = plan.unshard(everyone, 1).to(want)
            eps = torch.finfo(options.dtype).eps + 16 * torch.finfo(torch.float32).eps
            budget = 2 * float((low - want).abs().max()) + eps * float(want.abs().max())
            verdict[0][f"{name}_error_over_budget"] = float((got - want).abs().max()) / budget
    dist.broadcast_object_list(verdict)
    # NaN is not within a budget either.
    return {"ok": all(share <= 1 for share in verdict[0].values()), **verdict[0]}


def whole(
    inputs: tuple[Tensor, ...], mask: FlashMask, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[Tensor, ...]:
    q, k, v, dout = (x.to(dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    # What judges is another precision, which a named backend may not take: the op chooses one that does.
    backend = options.backend if dtype == options.dtype else "reference" if dtype == torch.float64 else None
    out = flashmask_attention(*leaves, mask, backend=backend)
    out.backward(dout)
    return out.detach(), *(x.grad for x in leaves)


def timing(case: Case, device: torch.device) -> dict[str, float]:
    """Median seconds of the slowest rank, forward and backward: in all, of attention alone, of the exchange alone."""
    syncs = host_syncs(case, device)
    for _ in range(3):
        case.backward(*case.forward())
    seconds = passes(case, device)
    exchange = dist.all_to_all_single
    try:
        dist.all_to_all_single = lambda *args, **kwargs: _Nothing()
        alone = passes(case, device)
    finally:
        dist.all_to_all_single = exchange
    plan, options = case.plan, case.options
    area = sum(plan.areas) / plan.head_parallel / plan.world_size
    heads = case.inputs[0].shape[2]
    result: dict[str, float] = {"host_syncs": syncs}
    for name, whole, compute, factor in zip(("forward", "backward"), seconds, alone, (1.0, 2.5), strict=True):
        result[f"{name}_seconds"], result[f"{name}_seconds_without_exchange"] = whole, compute
        result[f"{name}_seconds_exposed"] = whole - compute
        result[f"{name}_tflops_a_gpu"] = factor * 4 * options.head_dim * heads * area / whole / 1e12
    result["forward_seconds_of_exchange_alone"] = exchange_alone(case, device)
    keys = max(float(np.maximum(t.sum(0), t.sum(1)).max()) for t in (k - np.diag(k.diagonal()) for _, k in plan.tables))
    per_key = 2 * max(1, case.inputs[1].shape[2] // plan.head_parallel) * options.head_dim * case.mine[1].element_size()
    result["forward_bytes_at_most"] = keys * per_key
    return result


def host_syncs(case: Case, device: torch.device) -> int:
    """How often the host waited for the GPU in this rank's first forward and backward of a batch, as torch sees it."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            case.backward(*case.forward())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Torch's first word on the mode itself is no synchronisation.
    found = [str(w.message) for w in caught if "synchroniz" in str(w.message) and "prototype" not in str(w.message)]
    if found:
        print(f"rank {dist.get_rank()}: {found[0]} at {caught[0].filename}:{caught[0].lineno}", flush=True)
    return len(found)


def passes(case: Case, device: torch.device) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    forward, backward = [], []
    for _ in range(case.options.repeats):
        held: list[Any] = []
        forward.append(slowest(lambda held=held: held.extend(case.forward()), device))
        backward.append(slowest(lambda held=held: case.backward(*held), device))
    return statistics.median(forward), statistics.median(backward)


def exchange_alone(case: Case, device: torch.device) -> float:
    """Seconds of the forward's all-to-alls, with nothing to hide behind and nothing before them."""
    group = dist.group.WORLD
    assert group is not None
    k, stages = case.mine[1], case.opened().stages
    heads = max(1, k.shape[2] // case.opened().members)
    own = k.new_zeros(stages[0].mask.num_rows, 1, heads, 2 * k.shape[3])

    def exchange() -> None:
        for pending in [start_keys(stage, own, group) for stage in stages[1:]]:
            pending.wait()

    exchange()
    return statistics.median(slowest(exchange, device) for _ in range(case.options.repeats))


def slowest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the work is done on every rank."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begin, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


class _Nothing:
    """A collective that was left out: what it would have received is whatever lay there."""

    def wait(self) -> None: ...


if __name__ == "__main__":
    raise SystemExit(main())
