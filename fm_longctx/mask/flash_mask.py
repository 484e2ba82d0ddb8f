"""The mask type: intervals of masked rows per key column."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fm_longctx.mask import dense, draw, packed, reindex, stack, startend
from fm_longctx.mask.canonical import canonicalize, diagonal
from fm_longctx.mask.mask_mod import MaskMod, evaluate_mask_mod
from fm_longctx.mask.tiles import SKIPPED, tile_states


class FlashMask:
    """Row r sees column c unless an interval of c holds r. Causal also hides column c from rows `[0, c - (N_k - N_q))`.

    The whole format, for batch b and mask head h::

        dense = ones(N_q, N_k)
        for c in range(N_k):
            for start, end in zip(starts[b, h, :, c], ends[b, h, :, c]):
                dense[start:end, c] = 0
            if causal:
                dense[: max(0, c - (N_k - N_q)), c] = 0

    Two packed causal documents of 3 and 2 tokens (`causal_document([3, 2])`): each column is masked from its document's
    end on, and the diagonal does the rest. One interval a column, ten integers instead of 25 scores::

                 column 0 1 2 3 4
        row 0           x . . . .      starts  3 3 3 5 5
        row 1           x x . . .      ends    5 5 5 5 5     (start = end: no interval)
        row 2           x x x . .
        row 3           . . . x .
        row 4           . . . x x

    A mask is canonical once constructed: per column the intervals are clipped to the rows (and, when causal, to the
    rows on or below the diagonal), sorted, disjoint and not touching; out-of-range bounds are clipped, empty and
    inverted intervals dropped. So the area is a sum of lengths and equal masks have equal fingerprints.

    Masks are immutable; do not write to their tensors. `cache` holds what others derive from a mask (tile schedules),
    so that every layer and both directions share it.

    Args:
        starts, ends: int32 `[B, H_mask, K, N_k]` on one device, the half-open `[start, end)` of masked rows. K may be
            0. B is 1 or the batch; H_mask is 1, H_kv or H.
        causal: hide what lies above the diagonal, aligned bottom-right.
        num_rows: N_q; N_k if not given.

    Raises:
        ValueError: wrong dtype, rank, shape or device, or a negative row count.

    Source: FlashMask, arXiv 2410.01359, section 4.1, generalised from two intervals (lower, upper) to any number.
    """

    __slots__ = ("__weakref__", "cache", "causal", "ends", "num_rows", "starts")

    starts: Tensor
    ends: Tensor
    causal: bool
    num_rows: int
    cache: dict[Hashable, Any]

    def __init__(self, starts: Tensor, ends: Tensor, *, causal: bool, num_rows: int | None = None) -> None:
        for name, bounds in (("starts", starts), ("ends", ends)):
            if not isinstance(bounds, Tensor):
                raise ValueError(f"{name} must be an int32 tensor [B, H_mask, K, N_k], got {type(bounds).__name__}.")
            if bounds.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {bounds.dtype}. Convert it with {name}.to(torch.int32).")
            if bounds.ndim != 4:
                raise ValueError(f"{name} must have shape [B, H_mask, K, N_k], got {list(bounds.shape)}.")
        if starts.shape != ends.shape:
            raise ValueError(f"starts and ends must have one shape, got {list(starts.shape)} and {list(ends.shape)}.")
        if starts.device != ends.device:
            raise ValueError(f"starts and ends must be on one device, got {starts.device} and {ends.device}.")
        if not isinstance(causal, bool):
            raise ValueError(f"causal must be True or False, got {causal!r}.")
        rows = starts.shape[-1] if num_rows is None else num_rows
        if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows < 2**31:
            raise ValueError(f"num_rows must be an integer in [0, 2**31), got {num_rows!r}.")
        self.starts, self.ends = canonicalize(starts, ends, causal=causal, num_rows=rows)
        self.causal, self.num_rows, self.cache = causal, rows, {}

    @classmethod
    def from_canonical(cls, starts: Tensor, ends: Tensor, *, causal: bool, num_rows: int) -> FlashMask:
        """Wrap intervals that are canonical already (another mask's `starts` and `ends`); nothing is checked."""
        mask = object.__new__(cls)
        mask.starts, mask.ends, mask.causal, mask.num_rows, mask.cache = starts, ends, causal, num_rows, {}
        return mask

    # Shape

    @property
    def batch(self) -> int:
        """B: 1 (shared by the batch) or the batch size."""
        return self.starts.shape[0]

    @property
    def heads(self) -> int:
        """H_mask: 1 (shared by all heads), H_kv or H."""
        return self.starts.shape[1]

    @property
    def num_intervals(self) -> int:
        """K: the most intervals any column uses."""
        return self.starts.shape[2]

    @property
    def num_columns(self) -> int:
        """N_k: key positions."""
        return self.starts.shape[3]

    @property
    def device(self) -> torch.device:
        return self.starts.device

    def __repr__(self) -> str:
        scores = self.num_rows * self.num_columns * self.batch * self.heads
        visible = f"{int(self.area().sum()) / scores:.1%} visible" if scores else "empty"
        return (
            f"FlashMask({self.num_rows} rows x {self.num_columns} columns, batch={self.batch}, heads={self.heads}, "
            f"intervals={self.num_intervals}, causal={self.causal}, {visible}, device={self.device})"
        )

    # Other forms of a mask

    @classmethod
    def from_startend_row_indices(cls, indices: Tensor, *, causal: bool, num_rows: int | None = None) -> FlashMask:
        """From Paddle's form, int32 `[B, H_mask, N_k, V]`; see `fm_longctx.mask.startend`."""
        starts, ends = startend.to_intervals(indices, causal=causal, num_rows=num_rows)
        return cls(starts, ends, causal=causal, num_rows=num_rows)

    def to_startend_row_indices(self) -> Tensor:
        """Paddle's form with the fewest vectors, int32 `[B, H_mask, N_k, V]`; a ValueError if K is too large for it."""
        return startend.from_intervals(self)

    @classmethod
    def from_dense(cls, visible: Tensor, *, max_intervals: int = 4) -> FlashMask:
        """From bool `[N_q, N_k]` or `[B, H_mask, N_q, N_k]`, True = visible, with the fewest intervals.

        The result has `causal=False`. A ValueError names the first column that needs more than `max_intervals`.
        """
        starts, ends = dense.to_intervals(visible, max_intervals=max_intervals)
        return cls(starts, ends, causal=False, num_rows=visible.shape[-2])

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        *,
        num_rows: int,
        num_columns: int,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str = "cpu",
        max_intervals: int = 4,
        block: int = 1024,
    ) -> FlashMask:
        """From FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`, True = visible, with the fewest intervals.

        The function is called under `torch.vmap`, on `block` x `block` scores at a time; that is all the memory it
        takes. Every score is evaluated, so time is O(N_q x N_k): build such a mask once and keep it, and use a builder
        of `fm_longctx.mask` where one says the same. The result has `causal=False`. A ValueError names the first
        column that needs more than `max_intervals`; see `fm_longctx.mask.mask_mod`.
        """
        starts, ends = evaluate_mask_mod(
            mask_mod,
            num_rows=num_rows,
            num_columns=num_columns,
            batch=batch,
            heads=heads,
            device=torch.device(device),
            max_intervals=max_intervals,
            block=block,
        )
        return cls(starts, ends, causal=False, num_rows=num_rows)

    def to_dense(self) -> Tensor:
        """Bool `[B, H_mask, N_q, N_k]`, True = visible. N_q x N_k memory: for tests and pictures."""
        return dense.from_intervals(self)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, causal: bool = True) -> FlashMask:
        """Packed documents of these lengths, each seeing itself only."""
        return cls(*packed.from_lengths(lengths, causal=causal), causal=causal)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, causal: bool = True) -> FlashMask:
        """Packed documents from their cumulative lengths, integers `[documents + 1]` from 0 to N."""
        return cls(*packed.from_cu_seqlens(cu_seqlens, causal=causal), causal=causal)

    @classmethod
    def from_position_ids(cls, position_ids: Tensor, *, causal: bool = True) -> FlashMask:
        """Packed documents from integer positions `[N]` or `[B, N]`: one starts wherever they do not rise by 1."""
        return cls(*packed.from_position_ids(position_ids, causal=causal), causal=causal)

    @classmethod
    def stack(cls, masks: Sequence[FlashMask]) -> FlashMask:
        """One batch of several masks of one shape and device, whatever their intervals; see `fm_longctx.mask.stack`."""
        if len(masks) == 1:
            return masks[0]
        starts, ends, causal = stack.stack(masks)
        return cls(starts, ends, causal=causal, num_rows=masks[0].num_rows)

    # Algebra

    def __and__(self, other: FlashMask) -> FlashMask:
        """Visible in both. Batch and heads broadcast; rows, columns and device must agree."""
        if not isinstance(other, FlashMask):
            return NotImplemented
        starts, ends = reindex.intersect(self, other)
        return FlashMask(starts, ends, causal=self.causal or other.causal, num_rows=self.num_rows)

    def select(self, rows: Tensor, columns: Tensor | None = None) -> FlashMask:
        """The mask of `dense[rows][:, columns]`, exactly: any strictly ascending rows, any columns in any order.

        The result has `causal=False` (causality became an interval); see `fm_longctx.mask.reindex`.
        """
        starts, ends = reindex.select(self, rows, columns)
        return FlashMask(starts, ends, causal=False, num_rows=rows.numel())

    def to(self, device: torch.device | str) -> FlashMask:
        """The same mask on another device (itself if it is there already)."""
        if self.device == torch.empty(0, device=device).device:
            return self
        return FlashMask.from_canonical(
            self.starts.to(device, non_blocking=True),
            self.ends.to(device, non_blocking=True),
            causal=self.causal,
            num_rows=self.num_rows,
        )

    # Measures

    def area(self) -> Tensor:
        """Unmasked scores, int64 `[B, H_mask]`."""
        masked = (self.ends - self.starts).sum(dim=(2, 3), dtype=torch.int64)
        total = self.num_rows * self.num_columns
        if self.causal:
            total -= int(diagonal(self.num_rows, self.num_columns, torch.device("cpu")).sum(dtype=torch.int64))
        return total - masked

    def sparsity(self, block: int | tuple[int, int] = 128) -> float:
        """Share of `[block, block]` (or `[block[0], block[1]]`) tiles that are skipped, 0..1, over batch and heads."""
        block_m, block_n = (block, block) if isinstance(block, int) else block
        if block_m < 1 or block_n < 1:
            raise ValueError(f"block must be positive, got {block}.")
        states = tile_states(self, block_m, block_n)
        return float((states == SKIPPED).double().mean()) if states.numel() else 0.0

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the canonical content; equal for equal masks, on any device."""
        shape = (*self.starts.shape, self.num_rows, int(self.causal))
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        for bounds in (self.starts, self.ends):
            digest.update(bounds.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def draw(self, path: str | PathLike[str], **options: Any) -> None:
        """Save a picture (PNG or SVG by the path's ending); see `fm_longctx.mask.draw`."""
        draw.draw(self, path, **options)
