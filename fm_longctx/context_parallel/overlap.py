"""How the exchange is cut into stages: what ranks do in each, and the cut that is predicted to be fastest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fm_longctx.context_parallel.cost import CostModel, Work, predict_backward, predict_forward
from fm_longctx.context_parallel.coverage import Floats, Ints
from fm_longctx.context_parallel.layout import Layout
from fm_longctx.context_parallel.local import Staging, stage_slice

# More stages than these are not tried: each merges the rank's whole output once more.
_MOST_STAGES = 8
# Nor more than these where a rank's own keys wait for others': that is for a fast link.
_MOST_WAITING = 3
# How many times the keys of the stage before a stage may bring, besides as many.
_GROWTHS = (1.5, 2.0)


class StageTables(NamedTuple):
    """What each ring does in each stage, float64 `[rings, stages]`."""

    scores: Floats
    """Computed. Those of a pair of rings are taken to be spread over its keys evenly."""
    received: Floats
    """Keys that arrive from other rings."""
    sent: Floats
    """Keys that leave for other rings."""
    far: Floats
    """Keys that arrive from other hosts or leave for them, whichever are more."""
    near: Floats
    """The same within the host."""
    longest: Floats
    """Rows that see the key that most of the ring's rows see; as if every stage that brings keys had it."""


def stage_tables(
    scores: Floats | Ints, keys: Ints, longest: Floats, staging: Staging, rings_a_host: int
) -> StageTables:
    """Stages from the scores and keys of every pair of rings, `[destination, source]`; own ones on the diagonal.

    Args:
        longest: `[2, rings]`: rows of each ring that see the key that most of its rows see, of its own and of others'.
        rings_a_host: ring r is on host r // rings_a_host.
    """
    rings = len(scores)
    tables = StageTables(*(np.zeros((rings, staging.num_stages)) for _ in range(6)))
    tables.scores[:, staging.own_stage if rings > 1 else 0] = scores.diagonal()
    tables.longest[:, 1:] = longest[1][:, None]
    own = tables.longest[:, staging.own_stage if rings > 1 else 0]
    np.maximum(own, longest[0], out=own)
    # Of many rings few pairs meet.
    destination, source = np.nonzero(keys)
    remote = destination != source
    destination, source = destination[remote], source[remote]
    count, hops = keys[destination, source], (destination - source) % rings
    begin, end = stage_slice(count, hops, np.arange(1, staging.num_stages)[:, None], rings, staging)
    of_key = scores[destination, source] / count
    over = destination // rings_a_host != source // rings_a_host
    for s, travels in enumerate(end - begin, start=1):
        tables.scores[:, s] += np.bincount(destination, travels * of_key, rings)
        tables.received[:, s] = np.bincount(destination, travels, rings)
        tables.sent[:, s] = np.bincount(source, travels, rings)
        for moved, some in ((tables.far, over), (tables.near, ~over)):
            ends = (np.bincount(end, travels * some, rings) for end in (destination, source))
            moved[:, s] = np.maximum(*ends)
    return tables


class Pairs(NamedTuple):
    """What the rings of a layout have to do with one another, as far as chunks tell."""

    scores: Floats
    """`[destination, source]`: of one query head, own ones on the diagonal."""
    keys: Ints
    """`[destination, source]`: keys that the destination's rows see."""
    rows: Floats
    """`[rings]`: rows that see keys of others, over the batch entries."""
    longest: Floats
    """`[2, rings]`: as `stage_tables` takes it."""


def pairs(layout: Layout) -> Pairs:
    """Of a layout, from the needs of its chunks."""
    problem, owners = layout.problem, layout.assigned
    rings = problem.world_size
    load = np.bincount(owners, problem.load, rings)
    needs = problem.needs
    pair = owners[needs.rows] * rings + owners[needs.columns]
    scores = (
        np.bincount(pair, needs.keys * problem.sizes[needs.rows], rings**2).reshape(rings, rings).astype(np.float64)
    )
    np.fill_diagonal(scores, 0)
    # What needs tell of scores is an upper bound: a tile counts whole.
    scores *= np.minimum(1, load / np.maximum(scores.sum(1), 1))[:, None]
    np.fill_diagonal(scores, load - scores.sum(1))
    return Pairs(scores, layout.keys, problem.merging(owners) * layout.entries, layout.longest)


def choose_stages(
    layout: Layout, cost: CostModel, num_stages: int | None, own_stage: int | None, members: int
) -> tuple[Staging, float]:
    """How the exchange is cut, for the rank that takes longest, and the seconds of its forward and backward together.

    Of the choices whose predicted time is within 1% of the best, the one with the fewest passes of attention. A first
    stage of few keys arrives soon; the more it has, the longer it hides the next. Where the link is fast, waiting for
    the first keys costs less than attending to the rank's own ones by themselves.

    Args:
        num_stages: if it is given already.
        own_stage: the same; chosen only if neither is.
        members: ranks that split the heads of a ring.
    """
    rings = layout.world_size
    between = pairs(layout)
    a_host = cost.rings_a_host(members)
    rows = np.array(layout.problem.sizes.sum() * layout.entries / rings / members)
    trade = 2 * float(cost.trade_heads(rows, members))

    def time(staging: Staging) -> float:
        tables = stage_tables(between.scores / members, between.keys, between.longest, staging, a_host)
        share = layout.entries * max(1 / members, 1 / cost.kv_heads)
        far, near, merged = tables.far * share, tables.near * share, between.rows / members
        work = Work(tables.scores, far, near, np.full(rings, rows), merged, tables.longest)
        return trade + float(predict_forward(cost, work).total.max() + predict_backward(cost, work).total.max())

    counts = range(min(rings, 2), min(rings, _MOST_STAGES) + 1) if num_stages is None else [num_stages]
    times: dict[Staging, float] = {}
    for count in counts:
        staging = Staging(count, 1.0, own_stage or 0)
        times[staging] = time(staging)
        # Once two more stages in turn were for nothing, yet more are.
        if len(times) > 2 and min(list(times.values())[-2:]) > min(times.values()):
            break
    # Growing stages are for having fewer of them.
    most = min(times, key=lambda staging: times[staging]).num_stages
    for staging in list(times):
        if 2 < staging.num_stages <= most and staging.num_stages < rings:
            times |= {grown: time(grown) for grown in (staging._replace(growth=growth) for growth in _GROWTHS)}
    if rings > 1 and num_stages is None and own_stage is None:
        waiting = (Staging(count, 1.0, 1) for count in range(2, min(rings, _MOST_WAITING) + 1))
        times |= {staging: time(staging) for staging in waiting}
    good = 1.01 * min(times.values())
    best = min((s for s, seconds in times.items() if seconds <= good), key=lambda s: (s.num_stages - s.own_stage, s))
    return best, times[best]
