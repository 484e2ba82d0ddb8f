"""The plan: which rank owns which positions, and which keys it must receive, stage by stage. Pure CPU work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fm_longctx.context_parallel.choose import choose
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.coverage import Ints
from fm_longctx.context_parallel.layout import received_floor
from fm_longctx.context_parallel.local import Staging, exchange_tables, exchanged_keys, rank_stages
from fm_longctx.context_parallel.stages import RankPlan, member_counts
from fm_longctx.mask.flash_mask import FlashMask

if TYPE_CHECKING:
    from fm_longctx.context_parallel.report import PlanReport


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardPlan:
    """A layout of N positions over ranks, balanced for one mask or several, and the exchanges that each mask needs.

    Positions are cut into chunks (runs of positions) and each chunk has one owner. A rank's rows are those of its
    chunks in ascending order, so that every mask has an exact local form. Rank r receives the columns that at least one
    of its rows sees, and no others. Stage 0 is a rank's own keys; what it receives from each of the others is cut into
    the later stages by the same shares: with `num_stages` 2 all travels at once, with more the first keys arrive soon
    and hide the others; with `num_stages` equal to the world size one neighbour comes after the other, as in a ring.

    With `head_parallel` u the layout is one over world_size / u *rings*, each of u neighbouring ranks: rank r is member
    r % u of ring r // u. The members share the ring's rows, a run each, and trade rows for heads before and after
    attention (Ulysses), so that each attends to all rows of the ring with its part of the heads. Keys travel between
    the members of like number: whatever is said of ranks and stages below holds for rings.

    Build it with `ShardPlan.build`. It is a pure function of its arguments, so every rank can build it alone.

    >>> from fm_longctx.mask import causal
    >>> plan = ShardPlan.build(causal(8), world_size=2, chunk_size=1)
    >>> plan.rows(0).tolist(), plan.rows(1).tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])
    >>> round(plan.imbalance, 2)
    1.0
    """

    world_size: int

    num_stages: int

    growth: float
    """How many times the keys of the exchange before it each exchange brings."""

    own_stage: int
    """The stage in which a rank attends to its own keys: 0, or 1 with the first keys that come."""

    bounds: Tensor
    """int64 `[chunks + 1]`: chunk c is the positions `[bounds[c], bounds[c + 1])`."""

    owners: Tensor
    """int64 `[chunks]`: the ring of each chunk; its rank, without head parallelism."""

    areas: tuple[int, ...]
    """Unmasked scores of each rank (of its ring, for its part of the heads), summed over masks (times their weights),
    batch and mask heads."""

    masks: tuple[FlashMask, ...]
    """The masks that the layout was balanced for, on the CPU."""

    weights: tuple[int, ...]
    """How often each mask counts."""

    strategy: str

    head_parallel: int

    cost: CostModel
    """What the layout and the stages were chosen by."""

    @classmethod
    def build(
        cls,
        mask: FlashMask | Sequence[FlashMask],
        world_size: int,
        *,
        strategy: str = "balanced",
        chunk_size: int | None = None,
        num_stages: int | None = None,
        weights: Sequence[int] | None = None,
        own_stage: int | None = None,
        head_parallel: int | Literal["auto"] = 1,
        cost: CostModel | None = None,
    ) -> ShardPlan:
        """Plan self-attention of N positions over `world_size` ranks. Deterministic.

        Args:
            mask: N rows x N columns. One mask, or several of one length (full and sliding-window layers, say), which
                get one layout balanced over their sum. Per-sample and per-head masks are balanced together.
            world_size: ranks, >= 1. Each owns floor or ceil of N / world_size positions, whatever N is.
            strategy: `"balanced"` weighs load against traffic by the cost model; `"zigzag"` gives rank r the r-th of
                2 x world_size slices from the front and from the back; `"contiguous"` one slice each.
            chunk_size: positions in a chunk, for `balanced` only; small chunks balance better, large ones need less
                traffic. Where it does not divide a rank's share, the rank has one odd chunk. Chosen by the cost model
                if not given.
            num_stages: 2..world_size; more stages overlap more of the exchange with attention, in smaller messages.
                Chosen by the cost model if not given. With one rank there is only stage 0.
            weights: how often each mask counts (its number of layers), integers >= 1; once each if not given.
            own_stage: 0 attends to a rank's own keys while the first exchange is under way; 1 attends to them together
                with what that brings, in one pass less: for a fast link. Chosen by the cost model if neither this nor
                `num_stages` is given, else 0.
            head_parallel: u, ranks that share rows by splitting heads; divides world_size. `"auto"` lets the cost model
                choose it, for the heads of its layer and within its hosts: give it a `cost` with your model's.
            cost: kernel rate, link and layer shape; `CostModel()` if not given.

        Raises:
            ValueError: masks of different lengths or with N_q != N_k, an unknown strategy, or numbers out of range.
        """
        masks = (mask,) if isinstance(mask, FlashMask) else tuple(mask)
        _check_masks(masks)
        _check_numbers(world_size, chunk_size, num_stages, own_stage, head_parallel)
        if weights is None:
            weights = (1,) * len(masks)
        elif len(weights) != len(masks) or not all(type(w) is int and w >= 1 for w in weights):
            raise ValueError(f"weights must be {len(masks)} integers >= 1, one for each mask, got {list(weights)}.")
        masks, cost = tuple(m.to("cpu") for m in masks), cost or CostModel()
        head_parallel, layout, staging = choose(
            masks,
            weights,
            world_size,
            strategy=strategy,
            chunk_size=chunk_size,
            num_stages=num_stages,
            own_stage=own_stage,
            head_parallel=head_parallel,
            cost=cost,
        )
        return cls(
            world_size=world_size,
            **staging._asdict(),
            bounds=torch.from_numpy(layout.bounds),
            owners=torch.from_numpy(layout.owners),
            areas=tuple(layout.areas.repeat(head_parallel).tolist()),
            masks=masks,
            weights=tuple(weights),
            strategy=strategy,
            head_parallel=head_parallel,
            cost=cost,
        )

    @classmethod
    def from_owners(
        cls,
        mask: FlashMask | Sequence[FlashMask],
        owners: Tensor,
        world_size: int,
        *,
        num_stages: int | None = None,
    ) -> ShardPlan:
        """A plan whose layout somebody else has chosen: another library's sharding, say. Nothing is balanced.

        Args:
            mask: N rows x N columns; one or several, as in `build`.
            owners: integers `[N]` on the CPU: the rank of every position. Runs of one rank become the chunks.
            world_size: ranks, >= 1.
            num_stages: as in `build`, but 2 if not given.

        Raises:
            ValueError: as in `build`, or owners that do not name one of the ranks for each of the N positions.

        >>> from fm_longctx.mask import causal
        >>> plan = ShardPlan.from_owners(causal(6), torch.tensor([0, 0, 1, 1, 1, 0]), world_size=2)
        >>> plan.rows(0).tolist(), plan.areas
        ([0, 1, 5], (9, 12))
        """
        masks = (mask,) if isinstance(mask, FlashMask) else tuple(mask)
        _check_masks(masks)
        _check_numbers(world_size, None, num_stages, own_stage=None, head_parallel=1)
        n = masks[0].num_rows
        if owners.shape != (n,) or owners.is_floating_point():
            raise ValueError(f"owners must be {n} integers, one a position, got {owners.dtype} {list(owners.shape)}.")
        if n and not 0 <= int(owners.min()) <= int(owners.max()) < world_size:
            raise ValueError(
                f"owners must be ranks in 0..{world_size - 1}, got {int(owners.min())}..{int(owners.max())}."
            )
        ranks = owners.numpy().astype(np.int64)
        first = np.flatnonzero(np.diff(ranks, prepend=-1))
        bounds, ranks = np.append(first, n).astype(np.int64), ranks[first]
        masks = tuple(m.to("cpu") for m in masks)
        areas = sum(exchange_tables(m, bounds, ranks, world_size)[0].sum(1) for m in masks)
        return cls(
            world_size=world_size,
            num_stages=min(2, world_size) if num_stages is None else num_stages,
            growth=1.0,
            own_stage=0,
            bounds=torch.from_numpy(bounds),
            owners=torch.from_numpy(ranks),
            areas=tuple(areas.tolist()),
            masks=masks,
            weights=(1,) * len(masks),
            head_parallel=1,
            strategy="given",
            cost=CostModel(),
        )

    # Layout

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.bounds[-1])

    def rows(self, rank: int) -> Tensor:
        """The positions of a rank, ascending, int64 `[T]` on the CPU. Over the ranks they partition `range(N)`."""
        self._check_rank(rank)
        ring, member = divmod(rank, self.head_parallel)
        sources = np.repeat(self.owners.numpy(), np.diff(self.bounds.numpy()))
        rows = np.flatnonzero(sources == ring)
        counts = member_counts(len(rows), self.head_parallel)
        return torch.from_numpy(rows).split(counts)[member]

    @property
    def staging(self) -> Staging:
        return Staging(self.num_stages, self.growth, self.own_stage)

    @property
    def rings(self) -> int:
        """Groups of ranks that share rows: the world size, without head parallelism."""
        return self.world_size // self.head_parallel

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's part of a global tensor whose `dim` is positions; on x's device."""
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"dim {dim} of x must be the plan's {self.num_tokens} positions, got {list(x.shape)}. "
                "Pass the global tensor and the dimension of its positions."
            )
        return x.index_select(dim, self.rows(rank).to(x.device))

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The global tensor from every rank's part, in rank order: the inverse of `shard`."""
        rows = [self.rows(rank) for rank in range(self.world_size)]
        lengths = [len(r) for r in rows]
        if [x.shape[dim] for x in shards] != lengths:
            raise ValueError(
                f"the shards must have {lengths} positions along dim {dim}, one shard per rank in rank order; got "
                f"{[list(x.shape) for x in shards]}."
            )
        order = torch.cat(rows).argsort()
        return torch.cat(list(shards), dim).index_select(dim, order.to(shards[0].device))

    # What a rank attends to

    def local(self, rank: int, mask: FlashMask | None = None) -> RankPlan:
        """Everything that one rank needs to attend under one mask.

        Args:
            rank: 0..world_size - 1.
            mask: any mask of N rows and N columns (the layout is exact for all, balanced for its own); the first of the
                plan's if not given.
        """
        self._check_rank(rank)
        mask = self._square(mask)
        ring, member = divmod(rank, self.head_parallel)
        rows, stages = rank_stages(mask, self.bounds.numpy(), self.owners.numpy(), ring, self.rings, self.staging)
        return RankPlan(
            rank=rank,
            world_size=self.world_size,
            num_tokens=self.num_tokens,
            rows=self.rows(rank),
            member_counts=member_counts(len(rows), self.head_parallel),
            stages=tuple(stage.between_members(member, self.head_parallel) for stage in stages),
            fingerprint=_digest(self.fingerprint(), self._print_of(mask)),
        )

    def local_mask(self, rank: int, stage: int, mask: FlashMask | None = None) -> FlashMask:
        """The mask of a rank's rows and a stage's columns, both as the rank holds them. Arguments as in `local`."""
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage must be in 0..{self.num_stages - 1}, got {stage}.")
        return self.local(rank, mask).stages[stage].mask

    # Measures

    @property
    def imbalance(self) -> float:
        """Largest over mean area of the ranks, >= 1; 1.0 if there is no area."""
        total = sum(self.areas)
        return max(self.areas) * self.world_size / total if total else 1.0

    @cached_property
    def received_fraction(self) -> float:
        """Keys that a rank receives over those that an all-gather brings it, mean over ranks and masks; 0.0 if none.
        Both of the ring's part of the heads; what rows and heads are traded for is not in it."""
        fractions, bounds, owners = [], self.bounds.numpy(), self.owners.numpy()
        rows = np.bincount(owners, np.diff(bounds), self.rings)
        for mask in self.masks:
            keys = exchanged_keys(mask, bounds, owners, self.rings)
            remote = keys.sum(1) - keys.diagonal()
            fractions.append(float((remote / np.maximum(self.num_tokens - rows, 1)).mean()))
        return float(np.average(fractions, weights=self.weights))

    @cached_property
    def tables(self) -> tuple[tuple[Ints, Ints], ...]:
        """For each mask `exchange_tables`: scores and keys of each pair of rings, exact."""
        bounds, owners = self.bounds.numpy(), self.owners.numpy()
        return tuple(exchange_tables(mask, bounds, owners, self.rings) for mask in self.masks)

    def floor(self, tolerance: float = 0.02) -> float:
        """What any layout must receive whose area is even to the tolerance, as `received_fraction`: a lower bound."""
        return received_floor(self.masks, self.weights, self.rings, tolerance)

    def report(self) -> PlanReport:
        """Balance, traffic and predicted time of every rank; print it, or draw it with `report().draw(path)`."""
        from fm_longctx.context_parallel.report import PlanReport

        return PlanReport.of(self)

    def fingerprint(self) -> str:
        """32 hexadecimal digits; equal for equal plans of equal masks."""
        shape = (self.world_size, self.head_parallel, *self.staging)
        layout = (shape, self.bounds.tolist(), self.owners.tolist())
        return _digest(repr(layout), *self._prints)

    # Within

    @cached_property
    def _prints(self) -> tuple[str, ...]:
        return tuple(mask.fingerprint() for mask in self.masks)

    def _print_of(self, mask: FlashMask) -> str:
        known = (text for own, text in zip(self.masks, self._prints, strict=True) if own is mask)
        return next(known, None) or mask.fingerprint()

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1} (the plan's world size), got {rank}.")

    def _square(self, mask: FlashMask | None) -> FlashMask:
        if mask is None:
            return self.masks[0]
        _check_masks((mask,))
        if mask.num_rows != self.num_tokens:
            raise ValueError(
                f"the mask has {mask.num_rows} positions but the plan was built for {self.num_tokens}. "
                "Build the plan from this mask."
            )
        return mask.to("cpu")


def _check_masks(masks: Sequence[FlashMask]) -> None:
    if not masks or not all(isinstance(mask, FlashMask) for mask in masks):
        raise ValueError(
            f"mask must be a FlashMask or a non-empty sequence of them, got {[type(m).__name__ for m in masks]}."
        )
    for mask in masks:
        if mask.num_rows != mask.num_columns:
            raise ValueError(
                f"context parallelism shards self-attention: the mask must have as many rows as columns, got "
                f"{mask.num_rows} x {mask.num_columns}. Run flashmask_attention on one rank for other shapes."
            )
        if mask.num_rows != masks[0].num_rows:
            raise ValueError(
                f"masks of one plan must have one length, got {[m.num_rows for m in masks]}. Build a plan for each."
            )


def _check_numbers(
    world_size: int,
    chunk_size: int | None,
    num_stages: int | None,
    own_stage: int | None,
    head_parallel: int | Literal["auto"],
) -> None:
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size must be an integer >= 1, got {world_size!r}.")
    if head_parallel == "auto":
        head_parallel = 1
    if type(head_parallel) is not int or head_parallel < 1 or world_size % head_parallel:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"head_parallel must divide the {world_size} ranks: one of {divisors}, got {head_parallel!r}; or 'auto'."
        )
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer >= 1 or None to let the plan choose, got {chunk_size!r}.")
    rings = world_size // head_parallel
    lowest = min(2, rings)
    if num_stages is not None and (type(num_stages) is not int or not lowest <= num_stages <= rings):
        what = "ranks" if head_parallel == 1 else f"rings of {head_parallel} ranks"
        raise ValueError(f"num_stages must be an integer in {lowest}..{rings} for {rings} {what}, got {num_stages!r}.")
    if own_stage not in (None, 0, 1) or (own_stage == 1 and rings == 1):
        raise ValueError(f"own_stage must be 0, or 1 where there are keys to wait for, got {own_stage!r} for {rings}.")


def _digest(*parts: str) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()
