"""What one rank does with one batch: its rows, and per stage what it sends, receives and attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fm_longctx.mask.flash_mask import FlashMask

_INDICES = ("columns", "send_rows", "return_rows", "return_order")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One exchange and the attention to what it brings. Stage 0 exchanges nothing: it is the rank's own keys."""

    mask: FlashMask
    """The rank's rows x this stage's columns, as they arrive."""

    columns: Tensor
    """int64 `[n]`: global positions of the keys, in the order in which they arrive: by source rank, ascending."""

    receive_counts: tuple[int, ...]
    """Keys from each rank; their sum is n, but 0 in stage 0."""

    send_counts: tuple[int, ...]
    """Keys to each rank."""

    send_rows: Tensor
    """int64 `[sum of send_counts]`: which of the rank's own keys (local positions), destination after destination."""

    return_rows: Tensor
    """int64, `send_rows` in ascending order: where the gradients that come back go."""

    return_order: Tensor
    """int64: at which place of `send_rows` each stands; of equal ones in the order of ranks."""

    area: int
    """Unmasked scores of `mask`: a stage without any launches nothing."""

    def between_members(self, member: int, members: int) -> Stage:
        """The stage of one member of a ring of several: its peers are the members of like number."""
        if members == 1:
            return self

        def spread(counts: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(count if m == member else 0 for count in counts for m in range(members))

        return replace(self, receive_counts=spread(self.receive_counts), send_counts=spread(self.send_counts))

    def of_heads(self, first: int, last: int) -> Stage:
        """The stage under the mask heads `[first, last)`."""
        mask = self.mask
        part = FlashMask.from_canonical(
            mask.starts[:, first:last].contiguous(),
            mask.ends[:, first:last].contiguous(),
            causal=mask.causal,
            num_rows=mask.num_rows,
        )
        return replace(self, mask=part)

    def to(self, device: torch.device | str) -> Stage:
        """The same stage with its mask and its indices on a device.

        On the way to a GPU they go through pinned memory: from elsewhere the host would wait until the GPU has done
        what was asked of it before.
        """
        to_gpu = torch.device(device).type == "cuda" and self.columns.device.type == "cpu"
        stage = self.pin_memory() if to_gpu and not self.columns.is_pinned() else self
        return replace(
            stage,
            mask=stage.mask.to(device),
            **{name: getattr(stage, name).to(device, non_blocking=True) for name in _INDICES},
        )

    def pin_memory(self) -> Stage:
        """The same stage in pinned memory. Needs a GPU."""
        return replace(self, mask=pinned(self.mask), **{name: getattr(self, name).pin_memory() for name in _INDICES})

    def tensors(self) -> Iterator[Tensor]:
        """All that `to` moves."""
        yield from (self.mask.starts, self.mask.ends)
        yield from (getattr(self, name) for name in _INDICES)


@dataclass(frozen=True, kw_only=True, eq=False)
class RankPlan:
    """One rank's part of a `ShardPlan` under one mask: small, picklable, made in a loader's worker."""

    rank: int
    world_size: int

    num_tokens: int
    """N, the length of the whole sequence."""

    rows: Tensor
    """int64 `[T]`: the rank's positions, ascending."""

    member_counts: tuple[int, ...]
    """Positions of each rank of its ring, in order: one number, T, without head parallelism. The stages' rows are
    those of the whole ring."""

    stages: tuple[Stage, ...]

    fingerprint: str
    """Of plan and mask; the same on every rank that will work together."""

    def pin_memory(self) -> RankPlan:
        """The same part in pinned memory, for a loader's thread: a `ContextParallel` made of it copies nothing on the
        host. Needs a GPU."""
        return replace(self, stages=tuple(stage.pin_memory() for stage in self.stages))

    def to(self, device: torch.device | str) -> RankPlan:
        """The same part with its stages on a device; `rows` stays on the CPU."""
        return replace(self, stages=tuple(stage.to(device) for stage in self.stages))

    def tensors(self) -> Iterator[Tensor]:
        """All that `to` moves."""
        for stage in self.stages:
            yield from stage.tensors()


def pinned(mask: FlashMask) -> FlashMask:
    """The same mask in pinned memory. Needs a GPU."""
    return FlashMask.from_canonical(
        mask.starts.pin_memory(), mask.ends.pin_memory(), causal=mask.causal, num_rows=mask.num_rows
    )


def member_counts(rows: int, members: int) -> tuple[int, ...]:
    """How a ring's rows are shared by its members: ceil for the first ones, floor for the rest."""
    return tuple(rows // members + (m < rows % members) for m in range(members))
