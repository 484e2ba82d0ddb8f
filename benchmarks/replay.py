"""What `benchmarks.context_parallel` replays: parts of plans, made without a GPU, and the time they take on one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.packs import pack
from benchmarks.timing import Timer
from fm_longctx import ShardPlan
from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward, resolve_backend
from fm_longctx.context_parallel.cost import CostModel, backward_timeline, forward_timeline
from fm_longctx.context_parallel.coverage import Floats
from fm_longctx.context_parallel.exchange import add_gradients_
from fm_longctx.context_parallel.exchange import pack as pack_keys
from fm_longctx.context_parallel.heads import by_member, with_all_heads
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
LAYOUTS = ("balanced", "keys", "zigzag", "all_gather", "ulysses")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is replayed of one layout: all that is known before a GPU is asked."""

    identity: str
    """Equal for layouts that are the same plan."""
    scores: float
    """Of the whole mask."""
    ranks: list[int]
    """Those that are replayed."""
    parts: list[tuple[Stage, ...]]
    """Of each of these."""
    far: Floats
    """`[ranks, stages]`: keys to or from other hosts before each stage, whichever are more."""
    near: Floats
    """The same within the host."""
    heads: tuple[int, int]
    """Of a part: query heads, key/value heads."""
    members: int
    """Ranks that split the heads."""
    imbalance: float
    received: float
    stages: int
    """Passes of attention."""


def cost_model(options: argparse.Namespace) -> CostModel:
    return CostModel(
        heads=options.heads[0],
        kv_heads=options.heads[1],
        head_dim=options.head_dim,
        element_bytes=torch.empty(0, dtype=options.dtype).element_size(),
        bandwidth=options.bandwidth,
        host_bandwidth=options.host_bandwidth,
        host_ranks=options.host_ranks,
        latency=options.latency,
    )


def prepare(name: str, size: int, layout: str, seed: int, options: argparse.Namespace) -> Prepared | str:
    """A layout of a mask over so many ranks; or why there is none."""
    torch.set_num_threads(1)
    mask, cost = MASKS[name](options.tokens * size, seed), cost_model(options)
    common: dict[str, Any] = dict(scores=float(mask.area().sum()))
    if layout == "ulysses":
        if options.heads[0] % size:
            return f"{size} ranks do not divide {options.heads[0]} query heads"
        return Prepared(
            identity="ulysses",
            ranks=[0],
            parts=[(whole(mask),)],
            far=np.zeros((1, 1)),
            near=np.zeros((1, 1)),
            heads=(options.heads[0] // size, max(1, options.heads[1] // size)),
            members=size,
            imbalance=1.0,
            received=0.0,
            stages=1,
            **common,
        )
    strategy = "balanced" if layout in ("balanced", "keys") else "zigzag"
    plan = ShardPlan.build(
        mask, size, strategy=strategy, cost=cost, head_parallel="auto" if layout == "balanced" else 1
    )
    ranks = sampled(plan, options.ranks_sampled)
    members = plan.head_parallel
    common |= dict(
        ranks=ranks, imbalance=plan.imbalance, heads=(options.heads[0] // members, max(1, options.heads[1] // members))
    )
    if layout == "all_gather":
        elsewhere = np.array([[float(mask.num_columns - len(plan.rows(rank)))] for rank in ranks])
        # A gather sends every key to a host once, over all of its network cards, and on within it.
        over = (mask.num_columns - options.tokens * min(size, cost.host_ranks)) / min(size, cost.host_ranks)
        return Prepared(
            identity=f"all_gather {plan.fingerprint()}",
            parts=[(whole(mask.select(plan.rows(rank))),) for rank in ranks],
            far=np.full_like(elsewhere, over),
            near=elsewhere,
            members=1,
            received=1.0,
            stages=1,
            **common,
        )
    parts = [plan.local(rank).stages for rank in ranks]
    far, near = zip(*(traffic(rank, part, cost) for rank, part in zip(ranks, parts, strict=True)), strict=True)
    return Prepared(
        identity=plan.fingerprint(),
        parts=parts,
        far=np.array(far),
        near=np.array(near),
        members=members,
        received=plan.received_fraction,
        stages=plan.num_stages - plan.own_stage,
        **common,
    )


def traffic(rank: int, stages: Sequence[Stage], cost: CostModel) -> tuple[list[float], list[float]]:
    """Keys that a rank exchanges with other hosts, and within its own, before each stage: sent or received, whichever
    are more."""
    far, near = [], []
    for stage in stages:
        counts = np.array([stage.receive_counts, stage.send_counts], dtype=np.float64)
        counts[:, rank] = 0
        beside = np.arange(counts.shape[1]) // cost.host_ranks == rank // cost.host_ranks
        far.append(float(counts[:, ~beside].sum(1).max()))
        near.append(float(counts[:, beside].sum(1).max()))
    return far, near


def whole(mask: FlashMask) -> Stage:
    """Attention to all columns at once, of which nothing is exchanged."""
    none = torch.zeros(0, dtype=torch.int64)
    return Stage(
        mask=mask,
        columns=none,
        receive_counts=(),
        send_counts=(),
        send_rows=none,
        return_rows=none,
        return_order=none,
        area=int(mask.area().sum()),
    )


def sampled(plan: ShardPlan, count: int) -> list[int]:
    """The first ranks of rings by modelled time, busiest first, as evenly spread as so many can be; all for 0."""
    time_of = plan.report().forward.total
    order = np.argsort(-time_of, kind="stable")
    if 0 < count < len(order):
        order = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    return (order * plan.head_parallel).tolist()


def replay(prepared: Prepared, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measured and modelled seconds, and rates, of one layout."""
    begin, cost = time.perf_counter(), cost_model(options)
    wake(options)
    times = [measure(part, prepared.heads, options) for part in prepared.parts]
    forward, backward = (np.array([list(t[i]) for t in times]) for i in (0, 1))
    # Where there are fewer key/value heads than members, several hold the same one.
    share = max(1 / prepared.members, 1 / options.heads[1])
    transfers = [
        cost.transfer(prepared.far * share * num_bytes, prepared.near * share * num_bytes)
        for num_bytes in (cost.forward_key_bytes, cost.backward_key_bytes)
    ]
    if prepared.identity.startswith("all_gather"):
        modelled = [forward.sum(1) + transfers[0].sum(1), backward.sum(1) + transfers[1].sum(1)]
    else:
        modelled = [forward_timeline(forward, transfers[0]).total, backward_timeline(backward, transfers[1]).total]
    packing = [0.0, 0.0]
    if prepared.members > 1:
        packing = measure_trade(prepared.members, options)
        link = float(cost.trade_link(np.array(float(options.tokens)), prepared.members))
        modelled = [total + packed + link for total, packed in zip(modelled, packing, strict=True)]
    flops = 4.0 * options.head_dim * options.heads[0] * prepared.scores / size

    def rates(seconds: float, factor: float) -> float:
        return factor * flops / seconds / 1e12

    return {
        "identity": prepared.identity,
        "replayed": prepared.ranks,
        "head_parallel": prepared.members,
        "imbalance": prepared.imbalance,
        "received": prepared.received,
        "stages": prepared.stages,
        "flops_a_rank": flops,
        "measured_forward_seconds": forward.tolist(),
        "measured_backward_seconds": backward.tolist(),
        "measured_packing_seconds": packing,
        "modelled_forward_seconds": modelled[0].tolist(),
        "modelled_backward_seconds": modelled[1].tolist(),
        "compute_forward_tflops": rates(float(forward.sum(1).max()), 1.0),
        "compute_backward_tflops": rates(float(backward.sum(1).max()), 2.5),
        "total_forward_tflops": rates(float(modelled[0].max()), 1.0),
        "total_backward_tflops": rates(float(modelled[1].max()), 2.5),
        "seconds": time.perf_counter() - begin,
    }


def wake(options: argparse.Namespace) -> None:
    """Keep a GPU busy for a moment: one that waited for a plan has lowered its clocks."""
    if options.device == "cpu":
        return
    x = torch.zeros(8192, 8192, device=options.device, dtype=torch.bfloat16)
    for _ in range(100):  # some 150 ms
        x @ x
    torch.cuda.synchronize()


def warm(name: str, heads: tuple[int, int], staged: bool, options: argparse.Namespace) -> None:
    """Compile the kernels that ranks run for so many heads, into the cache that the timing process reads.

    Args:
        staged: by parts of plans as well, not only by the whole mask.
    """
    small = argparse.Namespace(**vars(options) | {"tokens": min(2048, options.tokens), "repeats": 1})
    mask = MASKS[name](4 * small.tokens, 0)
    measure([whole(mask)], heads, small)
    for own_stage in (0, 1) if staged else ():
        plan = ShardPlan.build(mask, 4, num_stages=2, own_stage=own_stage)
        measure(plan.local(1).stages, heads, small)
    if heads == tuple(options.heads):
        measure([whole(mask.select(plan.rows(1)))], heads, small)


def measure_trade(members: int, options: argparse.Namespace) -> list[float]:
    """Seconds of packing and unpacking where the members of a ring trade rows for heads, forward and backward."""
    timer = Timer(options.device, budget_ms=5.0, most=max(3, options.repeats))
    query, key = (
        torch.zeros(1, options.tokens, h, options.head_dim, device=options.device, dtype=options.dtype)
        for h in options.heads
    )
    split = {h: by_member(x, members) for h, x in zip(options.heads, (query, key), strict=True)}

    def there(x: Tensor) -> float:
        return timer(partial(by_member, x, members)).ms / 1e3

    def back(heads: int) -> float:
        return timer(partial(with_all_heads, split[heads], members, heads)).ms / 1e3

    query_there, query_back, key_there, key_back = (
        there(query),
        back(options.heads[0]),
        there(key),
        back(options.heads[1]),
    )
    # Q, K, V and the output; the output's gradient and those of Q, K, V.
    return [query_there + 2 * key_there + query_back, query_there + query_back + 2 * key_back]


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
