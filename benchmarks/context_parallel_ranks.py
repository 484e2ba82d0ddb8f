"""Context-parallel attention on several ranks with the real kernels, against one process.

    torchrun --nproc-per-node 4 -m benchmarks.context_parallel_ranks --transport gloo      # 2-4 ranks share one GPU
    torchrun --nproc-per-node 8 -m benchmarks.context_parallel_ranks --transport nccl      # one GPU each
    torchrun --nproc-per-node 2 -m benchmarks.context_parallel_ranks --device cpu --transport gloo --tokens 64

gloo moves GPU tensors through the host: correctness only, and no times are printed. NCCL does not let ranks share a
GPU; over it forward and backward are timed as well, by the slowest rank, median of --repeats. Every case is checked on
rank 0 against `flashmask_attention` on the whole sequence, output and the gradients of q, k and v; a wrong one shows no
speed, and the exit code is 1.

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.context_parallel import MASKS
from benchmarks.environment import environment
from fm_longctx import ContextParallel, ShardPlan, context_parallel_attention, flashmask_attention
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
    for name in options.masks:
        mask = tree(size * options.tokens) if name == "prefix_tree" else MASKS[name](size * options.tokens)
        for head_parallel in options.head_parallel:
            if size % head_parallel or options.heads[0] % head_parallel:
                continue
            row = run(name, mask, head_parallel, device, options)
            rows.append(row)
            wrong += not row["ok"]
            if rank == 0:
                print(json.dumps(row), flush=True)
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
    parser.add_argument("--head-parallel", type=int, nargs="+", default=[1, 2], help="those that divide the ranks")
    parser.add_argument("--stages", type=int, help="chosen by the cost model if not given")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs, over NCCL")
    parser.add_argument("--backend", help="of flashmask_attention; chosen if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--timeout", type=int, default=120, help="seconds a collective may wait for a rank")
    parser.add_argument("--out", type=Path, help="folder for a dated .jsonl; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    return options


def tree(n: int) -> FlashMask:
    """A prompt of half the tokens with two branches, the first of which branches again."""
    lengths = [n // 2, n // 8, n // 8, n // 8]
    return builders.prefix_tree([-1, 0, 1, 1, 0], [*lengths, n - sum(lengths)])


def run(
    name: str, mask: FlashMask, head_parallel: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    rank, size, n = dist.get_rank(), dist.get_world_size(), mask.num_rows
    generator = torch.Generator(device).manual_seed(0)  # the same inputs on every rank
    q, k, v, dout = (
        torch.randn(1, n, h, options.head_dim, generator=generator, device=device).to(options.dtype)
        for h in (options.heads[0], options.heads[1], options.heads[1], options.heads[0])
    )
    stages = None if options.stages is None else min(options.stages, size // head_parallel)
    plan = ShardPlan.build(mask, size, head_parallel=head_parallel, num_stages=stages)
    context = ContextParallel(dist.group.WORLD, plan, mask, device=device)
    mine = [plan.shard(x, rank, 1) for x in (q, k, v)]

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in mine]
        out = context_parallel_attention(*leaves, context, backend=options.backend)
        out.backward(plan.shard(dout, rank, 1))
        return [out.detach(), *(x.grad for x in leaves)]

    shards = step()
    row: dict[str, Any] = {
        "mask": name,
        "ranks": size,
        "head_parallel": head_parallel,
        "transport": options.transport,
        "tokens": n,
        "heads": list(options.heads),
        "head_dim": options.head_dim,
        "dtype": str(options.dtype).removeprefix("torch."),
        "stages": plan.num_stages,
        "imbalance": plan.imbalance,
        "received": plan.received_fraction,
    }
    row |= compare(plan, shards, (q, k, v, dout), mask.to(device), options)
    if row["ok"] and options.transport == "nccl":
        row |= timing(step, plan, options)
    return row


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


def timing(step: Any, plan: ShardPlan, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward together, of the slowest rank, and the rate a GPU."""
    for _ in range(3):
        step()
    times = []
    for _ in range(options.repeats):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - begin, device="cuda")
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        times.append(float(seconds))
    seconds = statistics.median(times)
    area = sum(plan.areas) / plan.head_parallel / plan.world_size
    flops = 3.5 * 4 * options.head_dim * options.heads[0] * area
    return {"seconds": seconds, "tflops_a_gpu": flops / seconds / 1e12}


if __name__ == "__main__":
    raise SystemExit(main())
