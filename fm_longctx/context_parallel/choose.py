"""All that a plan leaves to the cost model: layout, stages, and how many ranks split heads instead of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.coverage import segments
from fm_longctx.context_parallel.layout import Layout, choose_layout
from fm_longctx.context_parallel.local import Staging
from fm_longctx.context_parallel.overlap import choose_stages
from fm_longctx.mask.flash_mask import FlashMask

# Layouts of more rings take longer than a step to find: with these heads are split more ways, if they can be.
_MANY_RINGS = 64


class Choice(NamedTuple):
    """A plan's parts."""

    head_parallel: int
    layout: Layout
    staging: Staging


def choose(
    masks: Sequence[FlashMask],
    weights: Sequence[int],
    world_size: int,
    *,
    strategy: str,
    chunk_size: int | None,
    num_stages: int | None,
    own_stage: int | None,
    head_parallel: int | Literal["auto"],
    cost: CostModel,
) -> Choice:
    """Arguments as in `ShardPlan.build`. Head parallelism, if it is chosen, is the one of the fastest plan."""
    if head_parallel == "auto":
        candidates = ways_to_split(world_size, num_stages, own_stage, cost)
    else:
        candidates = [head_parallel]
    parts = [segments(mask) for mask in masks]
    found: list[tuple[float, Choice]] = []
    for members in candidates:
        rings = world_size // members
        layout = choose_layout(masks, parts, weights, rings, strategy, chunk_size, cost, cost.rings_a_host(members))
        staging, seconds = choose_stages(layout, cost, num_stages, own_stage, members)
        found.append((seconds, Choice(members, layout, staging)))
    return min(found, key=lambda timed: timed[0])[1]


def ways_to_split(world_size: int, num_stages: int | None, own_stage: int | None, cost: CostModel) -> list[int]:
    """Numbers of ranks that can split the heads of the cost model's layer, ascending: rings within one host.

    >>> ways_to_split(16, None, None, CostModel(heads=12, kv_heads=4))
    [1, 2, 4]
    """

    def possible(members: int) -> bool:
        rings = world_size // members
        splits = cost.kv_heads % members == 0 or members % cost.kv_heads == 0
        staged = num_stages is None or min(2, rings) <= num_stages <= rings
        shared = not own_stage or rings > 1
        divides = world_size % members == cost.host_ranks % members == cost.heads % members == 0
        return divides and splits and staged and shared

    ways = [members for members in range(1, min(world_size, cost.host_ranks) + 1) if possible(members)]
    return [members for members in ways if world_size // members <= _MANY_RINGS] or ways[-1:]
