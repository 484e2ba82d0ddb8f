"""What transformers calls in every attention layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fm_longctx import ContextParallel, context_parallel_attention, flashmask_attention
from fm_longctx.integrations.transformers.masks import MaskRequest, documents, within_window
from fm_longctx.integrations.transformers.registry import NAME
from fm_longctx.mask import FlashMask, builders

# Keywords with which some models ask for another attention than softmax(scale * q k^T) v.
_UNSUPPORTED = ("position_bias", "head_mask", "attention_bias", "block_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRequest | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    flashmask: FlashMask | Mapping[str, FlashMask] | None = None,
    context: ContextParallel | Mapping[str, ContextParallel] | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    once: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer under the mask of this call.

    Args:
        query, key, value: `[B, heads, N, D]`, as transformers lays them out; N is this rank's share under `context`.
        attention_mask: what `request_mask` noted: padding, window, and where the cache stands.
        sliding_window: keys that a row of this layer sees, itself included.
        flashmask: the mask of the sequences in this call; a sliding layer narrows it to its window. Or one for each
            kind of layer, under "full_attention" and "sliding_attention", taken as they are. Padding is hidden as well.
        context: group, plan and mask, where the sequences are sharded over ranks; or one for each kind of layer.
        position_ids: `[B or 1, N]`. Without `flashmask` and `context` the mask is causal, and a document starts
            wherever they do not rise by 1.
        cu_seq_lens_q, cu_seq_lens_k: `[documents + 1]`, as flattening collators pass them; must be equal.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: `[heads]`, the logit of each head's attention sink.
        once: what calls the attention op, as `once(op, q, k, v, mask, **options)`: an activation checkpoint's memory.

    Returns:
        out `[B, N, H, D]`, and None for the weights, which never exist.

    Raises:
        ValueError: two masks, none, or anything that a FlashMask or the attention cannot say.
    """
    if flashmask is not None and context is not None:
        raise ValueError("pass flashmask= or context= to the model's call, got both: a context has its mask already.")
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} is dense, which {NAME} does not take. Pass "
            "flashmask=FlashMask.from_dense(...) instead, or a 2-D attention_mask for padding."
        )
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported. Set attention_dropout=0.0 in its config.")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"this model passes {name} to its attention, which {NAME} does not support. Take a model without it or "
                'another implementation, such as "sdpa".'
            )
    if kwargs.get("output_attentions"):
        raise ValueError(f"output_attentions=True is not possible: {NAME} never forms the attention weights.")
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise ValueError(
            f"s_aux holds one sink logit a query head: it must be [{query.shape[1]}], got {list(s_aux.shape)}. Where "
            "heads are split over ranks, split the sinks with them."
        )

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    if context is not None:
        parallel = _op(context_parallel_attention, once)
        options["scale"] = scaling
        return _over_ranks(parallel, q, k, v, attention_mask, context, sliding_window, s_aux, **options), None

    boundaries = _boundaries(cu_seq_lens_q, cu_seq_lens_k)
    if flashmask is None:
        mask = _derived(module, attention_mask, sliding_window, position_ids, boundaries)
    else:
        mask = _explicit(flashmask, attention_mask, sliding_window, position_ids)
    if mask.device.type == "cpu" and q.device.type == "cuda":
        mask = _on_device(mask, q.device)
    op = _op(flashmask_attention, once)
    if s_aux is None:
        return op(q, k, v, mask, scale=scaling, **options), None
    out, lse = op(q, k, v, mask, scale=scaling, return_lse=True, **options)
    return _with_sinks(out, lse, s_aux), None


def _op(op: Callable[..., Any], once: Callable[..., Any] | None) -> Callable[..., Any]:
    return op if once is None else partial(once, op)


def _with_sinks(out: Tensor, lse: Tensor, s_aux: Tensor) -> Tensor:
    """out `[B, N, H, D]` with one more logit a head in the softmax: out * exp(lse) / (exp(lse) + exp(sink))."""
    gate = torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None]).transpose(1, 2)[..., None]
    return (out * gate).to(out.dtype)


@torch.compiler.disable
def _derived(
    module: nn.Module,
    request: MaskRequest | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
    boundaries: Tensor | None,
) -> FlashMask:
    """The mask that the call's padding, positions and window ask for.

    A break in a compiled model: how many intervals a mask has depends on its values.
    """
    if request is not None:
        return request.answer(_narrowest(request.window(), sliding_window), position_ids, boundaries)
    # Ulysses drops what transformers asked for and gathers the positions; models outside transformers ask for nothing.
    if position_ids is None or not getattr(module, "is_causal", True):
        raise ValueError(
            f'attn_implementation="{NAME}" does not know the mask of {type(module).__name__}: pass flashmask= (a '
            "FlashMask) or context= (a ContextParallel) to the model's call. Where this is one part of a larger model, "
            'such as its vision tower, give that part another implementation: attn_implementation={"text_config": '
            f'"{NAME}", "vision_config": "sdpa"}}.'
        )
    mask = _remembered(position_ids, boundaries)
    return mask if sliding_window is None else within_window(mask, sliding_window, None)


def _explicit(
    flashmask: FlashMask | Mapping[str, FlashMask],
    request: MaskRequest | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
) -> FlashMask:
    mask = _of_kind("flashmask", flashmask, sliding_window)
    if not isinstance(mask, FlashMask):
        raise ValueError(f"flashmask must be a FlashMask, or a mapping of them, got {type(mask).__name__}.")
    if request is not None:
        if (mask.num_rows, mask.num_columns) != (request.q_length, request.kv_length):
            raise ValueError(
                f"flashmask has {mask.num_rows} rows x {mask.num_columns} columns, but {request.q_length} queries meet "
                f"{request.kv_length} keys. Give each call its own mask; to generate from a prompt's mask, pass "
                "use_cache=False or the mask of the new rows."
            )
        if mask.device == request.device:
            mask = request.hide_padding(mask)
        elif request.padding is not None:
            mask = request.hide_padding(_on_device(mask, request.device))
    if sliding_window is not None and not isinstance(flashmask, Mapping):
        mask = within_window(mask, sliding_window, position_ids)
    return mask


def _over_ranks(
    op: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: MaskRequest | None,
    context: ContextParallel | Mapping[str, ContextParallel],
    sliding_window: int | None,
    s_aux: Tensor | None,
    **options: Any,
) -> Tensor:
    if request is not None and request.padding is not None and not bool(request.padding.all()):
        raise ValueError(
            "attention_mask hides tokens, which context= does not know: its mask is planned for whole sequences. Build "
            "it with the padding as a document of its own, and leave attention_mask out."
        )
    if request is not None and request.q_length != request.kv_length:
        raise ValueError(
            f"context= is for training: {request.q_length} queries meet {request.kv_length} keys from a cache, which "
            "the plan does not describe. Pass use_cache=False."
        )
    one = _of_kind("context", context, sliding_window)
    if not isinstance(one, ContextParallel):
        raise ValueError(
            f"context must be a ContextParallel, or a mapping of them, got {type(one).__name__}. Of what a "
            'collator made it is batch["context"].join(group).'
        )
    if sliding_window is not None and not isinstance(context, Mapping):
        _check_window(one, sliding_window)
    out: Tensor
    if s_aux is None:
        out = op(q, k, v, one, **options)
        return out
    out, lse = op(q, k, v, one, return_lse=True, **options)
    return _with_sinks(out, lse, s_aux)


def _of_kind(name: str, given: Any, sliding_window: int | None) -> Any:
    """What was given for this kind of layer."""
    if not isinstance(given, Mapping):
        return given
    kind = "full_attention" if sliding_window is None else "sliding_attention"
    if kind not in given:
        raise ValueError(f'{name}= has no entry for this layer: it needs "{kind}", got {sorted(given)}.')
    return given[kind]


def _check_window(context: ContextParallel, window: int) -> None:
    """The layer wants a sliding window: accept a context only if its mask already hides what lies outside."""
    if context.members > 1:
        raise ValueError(
            f"this layer has sliding_window={window}, which cannot be compared with the mask of a context with head "
            'parallelism. Pass context={"full_attention": ..., "sliding_attention": ...}.'
        )
    for stage in context.stages:
        mask, columns = stage.mask, stage.columns.cpu()
        key = (NAME, "within window", window)
        if key not in mask.cache:
            everywhere = builders.sliding_window(context.num_tokens, window)
            inside = everywhere.select(context.rows, columns).to(mask.device)
            mask.cache[key] = bool(((mask & inside).area() == mask.area()).all())
        if not mask.cache[key]:
            raise ValueError(
                f"this layer has sliding_window={window}, and the mask of context= shows tokens outside it. Pass "
                'context={"full_attention": ..., "sliding_attention": ...}, both under one plan: '
                "ShardPlan.build([mask, narrow]) with narrow = mask & "
                f"sliding_window({context.num_tokens}, {window})."
            )


def _boundaries(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Tensor | None:
    q, k = cu_seq_lens_q, cu_seq_lens_k
    if q is not None and k is not None and q is not k and not torch.equal(q, k):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k differ: documents would see keys of others. Pass flashmask= for that."
        )
    return k if q is None else q


def _narrowest(*windows: int | None) -> int | None:
    return min((w for w in windows if w is not None), default=None)


def _on_device(mask: FlashMask, device: torch.device) -> FlashMask:
    """The mask there, copied once and kept on the one that was given, so that its schedules are kept too."""
    key = (NAME, "on", device)
    if key not in mask.cache:
        mask.cache[key] = mask.to(device)
    moved: FlashMask = mask.cache[key]
    return moved


_memo: list[tuple[Tensor, Tensor | None, FlashMask]] = []


def _remembered(position_ids: Tensor, boundaries: Tensor | None) -> FlashMask:
    """The documents of these positions; the last answer again if they are the same, as they are in every layer."""
    for positions, other, mask in _memo:
        same = positions.shape == position_ids.shape and positions.device == position_ids.device
        if same and other is boundaries and torch.equal(positions, position_ids):
            return mask
    parts = documents(position_ids, boundaries)
    mask = parts[0] if len(parts) == 1 else parts[0] & parts[1]
    _memo[:] = [(position_ids, boundaries, mask)]
    return mask
