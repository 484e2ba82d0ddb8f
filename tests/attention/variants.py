"""Masks of every kind that the kernels tell apart, small, each with its dense form made without them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import cases
from fm_longctx import FlashMask


class Variant(NamedTuple):
    name: str
    mask: FlashMask
    visible: Tensor
    """bool `[1 or B, 1 or H_mask, N_q, N_k]`."""


def gpu_backends() -> list[str]:
    """The backends that the GPU here can run beside the reference."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return ["triton", "hopper"]
    return ["triton"]


def rule_variants(n: int) -> Iterator[Variant]:
    """The paper's cases, prefix tree and lambda at n rows and columns."""
    index = torch.arange(n)
    for case in cases(n, seed=3):
        yield Variant(case.name, case.mask, case.visible(index[:, None], index[None, :])[None, None])


def interval_variants(rows: int, columns: int, *, batch: int, heads: int, kv_heads: int) -> Iterator[Variant]:
    """0 to 5 random intervals a column, causal or not, shared or by sample and head, some rows without any column."""
    generator = torch.Generator().manual_seed(rows * columns)
    by = [(1, 1), (batch, kv_heads), (1, heads), (batch, 1), (1, kv_heads), (batch, heads)]
    for intervals, (mask_batch, mask_heads) in enumerate(by):
        for causal in (False, True):
            shape = (mask_batch, mask_heads, intervals, columns)
            starts = torch.randint(-5, rows + 5, shape, generator=generator, dtype=torch.int32)
            ends = starts + torch.randint(-3, max(1, rows // 3), shape, generator=generator, dtype=torch.int32)
            if intervals:
                starts[:, :, 0], ends[:, :, 0] = rows // 2, rows // 2 + 3
            yield Variant(
                f"{intervals} intervals, causal={causal}, [{mask_batch}, {mask_heads}]",
                FlashMask(starts, ends, causal=causal, num_rows=rows),
                _dense(starts, ends, causal, rows),
            )


def _dense(starts: Tensor, ends: Tensor, causal: bool, rows: int) -> Tensor:
    """The definition, a column's intervals one after the other."""
    row, column = torch.arange(rows)[:, None], torch.arange(starts.shape[-1])
    visible = torch.ones(*starts.shape[:2], rows, starts.shape[-1], dtype=torch.bool)
    for i in range(starts.shape[2]):
        visible &= ~((row >= starts[:, :, i, None]) & (row < ends[:, :, i, None]))
    return visible & (column - (starts.shape[-1] - rows) <= row) if causal else visible
