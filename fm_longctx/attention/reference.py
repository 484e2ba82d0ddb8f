"""The reference backend: FlashMask attention as blockwise torch. This file is the specification of the others.

Same algorithm as the kernels: online softmax over the tiles of a row-block that are not skipped, the mask applied to
partial tiles only. Any device; float64 inputs are computed in float64, all others in float32.
Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2; FlashMask (arXiv 2410.01359), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fm_longctx.mask import FlashMask
from fm_longctx.mask.canonical import diagonal
from fm_longctx.mask.tiles import PARTIAL, SKIPPED, tile_states

BLOCK_M, BLOCK_N = 256, 256


class Schedule(NamedTuple):
    """What this backend visits: the states of all tiles."""

    states: Tensor
    """uint8 `[B, H_mask, row-blocks, column-blocks]`, as `fm_longctx.mask.tiles.tile_states` gives them."""


def refusal(q: Tensor, v: Tensor, intervals: int, softcap: float | None) -> str | None:
    """Why this backend cannot run on these inputs: never, it takes every device, dtype, dimension and mask."""
    return None


def schedules_needed(
    q: Tensor, v: Tensor, mask: FlashMask, *, backward: bool, deterministic: bool
) -> list[tuple[int, int, bool]]:
    """(block_m, block_n, by_row) of every schedule that a pass reads."""
    return [(BLOCK_M, BLOCK_N, True)]


def schedules(mask: FlashMask, keys: Sequence[tuple[int, int, bool]]) -> list[Schedule]:
    """The states of tiles of each (block_m, block_n, by_row), cached on the mask."""
    places = [(Schedule, *key) for key in keys]
    for place, (block_m, block_n, _) in zip(places, keys, strict=True):
        if place not in mask.cache:
            mask.cache[place] = Schedule(tile_states(mask, block_m, block_n))
    return [mask.cache[place] for place in places]


class _Group(NamedTuple):
    """The batch entries and heads that share one mask: every query head of the group visits the same tiles."""

    visits: list[list[tuple[int, bool]]]
    """Per row-block, (column-block, partial)."""
    starts: Tensor
    ends: Tensor
    """int32 `[K, N_k]`."""
    batch: slice
    kv_heads: slice
    heads: slice


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    softcap: float | None = None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out `[B, N_q, H, D_v]` in `out_dtype` and lse `[B, H, N_q]` float32 (float64 for float64 inputs), natural log."""
    exact = torch.promote_types(q.dtype, torch.float32)
    b, n_q, h, _ = q.shape
    out = q.new_zeros((b, n_q, h, v.shape[-1]), dtype=out_dtype)
    lse = q.new_full((b, h, n_q), float("-inf"), dtype=exact)
    for group in _groups(h, k.shape[2], mask):
        q_g, out_g = (_queries(x, group, k.shape[2]) for x in (q, out))
        k_g, v_g = (_keys(x, group) for x in (k, v))
        lse_g = lse[group.batch, group.heads].unflatten(1, q_g.shape[1:3])
        for block, visits in enumerate(group.visits):
            rows = slice(block * BLOCK_M, min((block + 1) * BLOCK_M, n_q))
            q_r = q_g[..., rows, :].to(exact) * scale
            acc = q_r.new_zeros((*q_r.shape[:-1], v.shape[-1]))
            top = q_r.new_full(q_r.shape[:-1], float("-inf"))
            total = torch.zeros_like(top)
            for column_block, partial in visits:
                columns = slice(column_block * BLOCK_N, (column_block + 1) * BLOCK_N)
                s = _times(q_r, k_g[:, :, columns].to(exact).mT)
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                if partial:
                    s = s.masked_fill(_hidden(mask, group, rows, columns), float("-inf"))
                new_top = torch.maximum(top, s.amax(-1))
                # A row that has seen no column yet: any finite reference will do, and -inf would give NaN.
                anchor = new_top.masked_fill(new_top == float("-inf"), 0)
                p = torch.exp(s - anchor[..., None])
                decay = torch.exp(top - anchor)
                total = total * decay + p.sum(-1)
                acc = acc * decay[..., None] + _times(p, v_g[:, :, columns].to(exact))
                top = new_top
            seen = total > 0
            out_g[..., rows, :] = (acc / total.where(seen, 1)[..., None]).to(out_dtype)
            lse_g[..., rows] = torch.where(seen, top + total.log(), float("-inf"))
    return out, lse


def compute_delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """As `fm_longctx.attention.passes.attention_delta`."""
    exact = torch.promote_types(out.dtype, torch.float32)
    total = (out.to(exact) * dout.to(exact)).sum(-1).transpose(1, 2)
    return (total if dlse is None else total - dlse).contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    softcap: float | None = None,
    grad_dtype: torch.dtype,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in `grad_dtype`, shaped as q, k, v. lse and delta `[B, H, N_q]`. Deterministic in any case."""
    exact = torch.promote_types(q.dtype, torch.float32)
    n_q, h = q.shape[1], q.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
    for group in _groups(h, k.shape[2], mask):
        q_g, dout_g, dq_g = (_queries(x, group, k.shape[2]) for x in (q, dout, dq))
        k_g, v_g, dk_g, dv_g = (_keys(x, group) for x in (k, v, dk, dv))
        lse_g, delta_g = (x[group.batch, group.heads].unflatten(1, q_g.shape[1:3]) for x in (lse, delta))
        for block, visits in enumerate(group.visits):
            rows = slice(block * BLOCK_M, min((block + 1) * BLOCK_M, n_q))
            q_r, dout_r = q_g[..., rows, :].to(exact) * scale, dout_g[..., rows, :].to(exact)
            # exp(s - inf) = 0: a row that sees nothing has no gradient.
            lse_r = lse_g[..., rows].to(exact)
            lse_r = lse_r.masked_fill(lse_r == float("-inf"), float("inf"))[..., None]
            delta_r = delta_g[..., rows].to(exact)[..., None]
            for column_block, partial in visits:
                columns = slice(column_block * BLOCK_N, (column_block + 1) * BLOCK_N)
                k_c, v_c = k_g[:, :, columns].to(exact), v_g[:, :, columns].to(exact)
                s = _times(q_r, k_c.mT)
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                p = torch.exp(s - lse_r)
                if partial:
                    p = p.masked_fill(_hidden(mask, group, rows, columns), 0)
                ds = p * (_times(dout_r, v_c.mT) - delta_r)
                if softcap is not None:
                    ds = ds * (1 - (s / softcap).square())
                dv_g[:, :, columns] += p.flatten(2, 3).mT @ dout_r.flatten(2, 3)
                dk_g[:, :, columns] += ds.flatten(2, 3).mT @ q_r.flatten(2, 3)
                dq_g[..., rows, :] += _times(ds, k_c) * scale
    return dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)


def _groups(heads: int, kv_heads: int, mask: FlashMask) -> Iterator[_Group]:
    states = schedules(mask, [(BLOCK_M, BLOCK_N, True)])[0].states.tolist()
    share = heads // kv_heads
    everything = slice(None)
    for b in range(mask.batch):
        for h in range(mask.heads):
            if mask.heads == 1:
                group_heads, group_kv_heads = everything, everything
            else:
                width = heads // mask.heads
                group_heads = slice(h * width, (h + 1) * width)
                kv_head = h * width // share
                group_kv_heads = slice(kv_head, kv_head + 1)
            yield _Group(
                visits=[
                    [(j, state == PARTIAL) for j, state in enumerate(row) if state != SKIPPED] for row in states[b][h]
                ],
                starts=mask.starts[b, h],
                ends=mask.ends[b, h],
                batch=slice(b, b + 1) if mask.batch > 1 else everything,
                kv_heads=group_kv_heads,
                heads=group_heads,
            )


def _queries(x: Tensor, group: _Group, kv_heads: int) -> Tensor:
    """The group's part of `[B, N, H, D]` as a view `[b, h_kv, query heads a kv head, N, D]`."""
    x = x[group.batch, :, group.heads]
    shared_by = kv_heads if group.kv_heads == slice(None) else 1
    return x.unflatten(2, (shared_by, -1)).permute(0, 2, 3, 1, 4)


def _keys(x: Tensor, group: _Group) -> Tensor:
    """The group's part of `[B, N, H_kv, D]` as a view `[b, h_kv, N, D]`."""
    return x[group.batch, :, group.kv_heads].transpose(1, 2)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """`[b, h_kv, g, m, x] @ [b, h_kv, x, n]` without repeating b for the g query heads that share it."""
    return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def _hidden(mask: FlashMask, group: _Group, rows: slice, columns: slice) -> Tensor:
    """Bool `[rows, columns]`, True = masked."""
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=mask.device)[:, None]
    hidden = ((row >= group.starts[:, None, columns]) & (row < group.ends[:, None, columns])).any(0)
    if mask.causal:
        hidden |= row < diagonal(mask.num_rows, mask.num_columns, mask.device)[columns]
    return hidden
