"""The plan: which rank owns which positions, and which keys it must receive, stage by stage. Pure CPU work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fm_longctx.context_parallel.assign import Assignment, assign
from fm_longctx.context_parallel.coverage import Ints, chunk_tables, seen_columns, segments
from fm_longctx.context_parallel.stages import RankPlan, Stage
from fm_longctx.mask.flash_mask import FlashMask

# While the imbalance is above this, chunks of half the size are tried, up to this number.
_GOOD_IMBALANCE = 1.05
_MOST_CHUNKS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardPlan:
    """A layout of N positions over ranks, balanced for one mask or several, and the exchanges that each mask needs.

    Positions are cut into chunks (runs of positions) and each chunk has one owner. A rank's rows are those of its
    chunks in ascending order, so that every mask has an exact local form. Rank r receives the columns that at least one
    of its rows sees, and no others. Stage 0 is a rank's own keys; the pair (source, destination) exchanges in one of
    the later stages, chosen by (destination - source) modulo the world size: with `num_stages` 2 all at once, with
    `num_stages` equal to the world size one neighbour after the other, as in a ring.

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

    bounds: Tensor
    """int64 `[chunks + 1]`: chunk c is the positions `[bounds[c], bounds[c + 1])`."""

    owners: Tensor
    """int64 `[chunks]`: the rank of each chunk."""

    areas: tuple[int, ...]
    """Unmasked scores of each rank, summed over masks, batch and mask heads."""

    masks: tuple[FlashMask, ...]
    """The masks that the layout was balanced for, on the CPU."""

    @classmethod
    def build(
        cls,
        mask: FlashMask | Sequence[FlashMask],
        world_size: int,
        *,
        chunk_size: int | None = None,
        num_stages: int | None = None,
    ) -> ShardPlan:
        """Plan self-attention of N positions over `world_size` ranks. Deterministic.

        Args:
            mask: N rows x N columns. One mask, or several of one length (full and sliding-window layers, say), which
                get one layout balanced over their sum. Per-sample and per-head masks are balanced together.
            world_size: ranks, >= 1. Each owns floor or ceil of N / world_size positions, whatever N is.
            chunk_size: positions in a chunk; small chunks balance better, large ones need less traffic. Where it does
                not divide a rank's share, the rank has one odd chunk. Chosen by N and world_size if not given.
            num_stages: 2..world_size; more stages overlap more of the exchange with attention, in smaller messages.
                2 if not given. With one rank there is only stage 0.

        Raises:
            ValueError: masks of different lengths or with N_q != N_k, or numbers out of range.
        """
        masks = (mask,) if isinstance(mask, FlashMask) else tuple(mask)
        _check_masks(masks)
        stages = min(2, world_size) if num_stages is None else num_stages
        _check_numbers(world_size, chunk_size, stages)
        masks = tuple(m.to("cpu") for m in masks)
        n = masks[0].num_rows
        bounds, areas, best = _layout(masks, world_size, chunk_size or _chunk_size(n, world_size))
        if chunk_size is None:
            # A mask with a few heavy rows asks for smaller chunks.
            size = _chunk_size(n, world_size) // 2
            while best.imbalance > _GOOD_IMBALANCE and n <= size * _MOST_CHUNKS:
                size, other = size // 2, _layout(masks, world_size, size)
                if other[-1].cost < best.cost:
                    bounds, areas, best = other
        return cls(
            world_size=world_size,
            num_stages=stages,
            bounds=torch.from_numpy(bounds),
            owners=torch.from_numpy(best.owners),
            areas=tuple(areas.tolist()),
            masks=masks,
        )

    # Layout

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.bounds[-1])

    def rows(self, rank: int) -> Tensor:
        """The positions of a rank, ascending, int64 `[T]` on the CPU. Over the ranks they partition `range(N)`."""
        return torch.from_numpy(self._rows(rank))

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
        mask = self._square(mask)
        parts = segments(mask, self.bounds.numpy())
        rows = self._rows(rank)
        sources = self._sources()
        seen = seen_columns(parts, rows)
        own = parts.only(sources[parts.first] == rank)
        wanted = [np.flatnonzero(seen_columns(own, self._rows(r))) for r in range(self.world_size)]
        return RankPlan(
            rank=rank,
            world_size=self.world_size,
            num_tokens=self.num_tokens,
            rows=torch.from_numpy(rows),
            stages=tuple(self._stage(rank, s, mask, rows, sources, seen, wanted) for s in range(self.num_stages)),
            fingerprint=_digest(self.fingerprint(), mask.fingerprint()),
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
        """Keys that a rank receives over those that an all-gather brings it, mean over ranks and masks; 0.0 if none."""
        fractions = []
        sources = self._sources()
        for mask in self.masks:
            parts = segments(mask, self.bounds.numpy())
            for rank in range(self.world_size):
                remote = sources != rank
                received = seen_columns(parts, self._rows(rank)) & remote
                fractions.append(received.sum() / max(1, remote.sum()))
        return float(np.mean(fractions))

    def fingerprint(self) -> str:
        """32 hexadecimal digits; equal for equal plans of equal masks."""
        layout = (self.world_size, self.num_stages, self.bounds.tolist(), self.owners.tolist())
        return _digest(repr(layout), *(mask.fingerprint() for mask in self.masks))

    # Within

    def _rows(self, rank: int) -> Ints:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1} (the plan's world size), got {rank}.")
        return np.flatnonzero(self._sources() == rank)

    def _sources(self) -> Ints:
        """The owner of every position."""
        return np.repeat(self.owners.numpy(), np.diff(self.bounds.numpy()))

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

    def _stage(
        self,
        rank: int,
        stage: int,
        mask: FlashMask,
        rows: Ints,
        sources: Ints,
        seen: npt.NDArray[np.bool_],
        wanted: list[Ints],
    ) -> Stage:
        """One stage of a rank; `seen` [N] is what its rows see, `wanted[r]` the positions of it that rank r sees."""
        none = np.zeros(0, dtype=np.int64)
        if stage == 0:
            received, sent = [none] * self.world_size, [none] * self.world_size
            columns = rows
        else:
            received = [
                np.flatnonzero(seen & (sources == r)) if self._stage_of(r, rank) == stage else none
                for r in range(self.world_size)
            ]
            sent = [wanted[r] if self._stage_of(rank, r) == stage else none for r in range(self.world_size)]
            columns = np.concatenate(received)
        return Stage(
            mask=mask.select(torch.from_numpy(rows), torch.from_numpy(columns)),
            columns=torch.from_numpy(columns),
            receive_counts=tuple(len(r) for r in received),
            send_counts=tuple(len(s) for s in sent),
            send_rows=torch.from_numpy(np.searchsorted(rows, np.concatenate(sent))),
        )

    def _stage_of(self, source: int, destination: int) -> int:
        """The stage in which one rank's keys travel to another's; 0 to itself."""
        hops = (destination - source) % self.world_size
        return 0 if hops == 0 else 1 + (hops - 1) * (self.num_stages - 1) // (self.world_size - 1)


def chunk_grid(n: int, world_size: int, chunk_size: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Chunks of n positions that ranks can share equally: bounds int64 `[chunks + 1]`, and which chunks are odd.

    A rank's floor(n / world_size) positions are chunks of `chunk_size` and one odd chunk with the rest, of half to one
    and a half chunks; the first n % world_size odd chunks have one position more. The odd ones lie evenly between the
    others. Any choice of one odd chunk and equally many others gives a rank floor or ceil of n / world_size positions.

    >>> chunk_grid(11, 2, 2)
    (array([ 0,  2,  4,  6,  8, 10, 11]), array([False, False,  True, False, False,  True]))
    """
    share, longer = divmod(n, world_size)
    chunk_size = min(chunk_size, max(share, 1))
    whole = max(0, (2 * share + chunk_size) // (2 * chunk_size) - 1)
    sizes = np.full((world_size, whole + 1), chunk_size)
    sizes[:, whole] = share - whole * chunk_size
    sizes[:longer, whole] += 1
    odd = np.zeros(sizes.shape, dtype=bool)
    odd[:, whole] = sizes[:, whole].max() != chunk_size or longer > 0
    flat, is_odd = sizes.ravel(), odd.ravel()
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), flat[flat > 0].cumsum()])
    return bounds, is_odd[flat > 0]


def _layout(masks: Sequence[FlashMask], world_size: int, chunk_size: int) -> tuple[Ints, Ints, Assignment]:
    """Chunk bounds, each rank's area, and each chunk's owner, balanced over the masks' sum."""
    bounds, odd = chunk_grid(masks[0].num_rows, world_size, chunk_size)
    chunks = len(bounds) - 1
    area = np.zeros(chunks, dtype=np.int64)
    visible = np.zeros((chunks, chunks), dtype=np.int64)
    for mask in masks:
        mask_area, mask_visible = chunk_tables(segments(mask, bounds), bounds)
        area += mask_area.sum(1)
        visible = np.maximum(visible, mask_visible)
    assignment = assign(area, visible, np.diff(bounds), odd, world_size)
    return bounds, np.bincount(assignment.owners, area, world_size).astype(np.int64), assignment


def _chunk_size(n: int, world_size: int) -> int:
    """At least 8 chunks a rank and 64 in all; in whole tiles of 128 where they are that large."""
    size = n // max(8 * world_size, 64)
    return size // 128 * 128 if size >= 128 else max(1, size)


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


def _check_numbers(world_size: int, chunk_size: int | None, num_stages: int) -> None:
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size must be an integer >= 1, got {world_size!r}.")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer >= 1 or None to let the plan choose, got {chunk_size!r}.")
    lowest = min(2, world_size)
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or not lowest <= num_stages <= world_size:
        raise ValueError(
            f"num_stages must be an integer in {lowest}..{world_size} for {world_size} ranks, got {num_stages!r}."
        )


def _digest(*parts: str) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()
