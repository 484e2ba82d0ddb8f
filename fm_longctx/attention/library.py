"""The op as PyTorch knows it: registered with torch.library, so that compile, export and autograd see one node.

Such ops take tensors, so a mask crosses as its intervals and the tile lists that the kernels will read, and is put
together again on the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fm_longctx.attention.passes import attention_backward, attention_delta, attention_forward, load_backend
from fm_longctx.mask import FlashMask
from fm_longctx.mask.schedule import TileLists, tile_lists


def attend(q: Tensor, k: Tensor, v: Tensor, mask: FlashMask, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Differentiable out `[B, N_q, H, D_v]` and lse `[B, H, N_q]`; the arguments are valid and the backend is named."""
    keys = load_backend(backend).lists_needed(q, v, backward=False)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        keys += [key for key in load_backend(backend).lists_needed(q, v, backward=True) if key not in keys]
    lists: list[Tensor] = []
    for block_m, block_n, by_row in keys:
        built = tile_lists(mask, block_m, block_n, by_row=by_row)
        lists.extend((built.offsets, built.entries, built.order))
    flat_keys = [int(part) for key in keys for part in key]
    return _forward(q, k, v, mask.starts, mask.ends, lists, flat_keys, mask.causal, scale, backend)


def _mask(
    q: Tensor, starts: Tensor, ends: Tensor, lists: Sequence[Tensor], keys: Sequence[int], causal: bool
) -> FlashMask:
    mask = FlashMask.from_canonical(starts, ends, causal=causal, num_rows=q.shape[1])
    for i in range(0, len(keys), 3):
        mask.cache["tiles", keys[i], keys[i + 1], bool(keys[i + 2])] = TileLists(*lists[i : i + 3])
    return mask


@torch.library.custom_op("fm_longctx::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    lists: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = _mask(q, starts, ends, lists, keys, causal)
    return attention_forward(q, k, v, mask, scale=scale, backend=backend)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    lists: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, n_q, h, _ = q.shape
    out = q.new_empty((b, n_q, h, v.shape[-1]))
    return out, q.new_empty((b, h, n_q), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("fm_longctx::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    lists: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(q, starts, ends, lists, keys, causal)
    delta = attention_delta(out, dout, dlse)
    return attention_backward(dout, q, k, v, lse, delta, mask, scale=scale, backend=backend)


@_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    lists: Sequence[Tensor],
    keys: Sequence[int],
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ends, lists, ctx.keys, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends, *lists)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, starts, ends, *lists = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = _backward(
        dout, dlse, q, k, v, out, lse, starts, ends, lists, ctx.keys, ctx.causal, ctx.scale, ctx.backend
    )
    return dq, dk, dv, None, None, [None] * len(lists), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
