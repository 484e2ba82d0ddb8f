"""Hugging Face transformers: `attn_implementation="fm_longctx"`.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fm_longctx")
    model(tokens, position_ids=positions, use_cache=False, flashmask=causal_document(lengths))
    model(tokens, position_ids=positions, use_cache=False, context=ContextParallel(group, plan, mask))

The mask travels as a keyword of the model's call, which transformers hands to every attention layer unchanged, under
activation checkpointing too. transformers itself never builds a mask. Whatever cannot be honoured is a ValueError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fm_longctx import ContextParallel, context_parallel_attention, flashmask_attention
from fm_longctx.mask import FlashMask, builders

NAME = "fm_longctx"
"""The name to pass as `attn_implementation`."""

# Keywords with which some models ask for another attention than softmax(scale * q k^T) v.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "attention_bias", "block_mask")


def register() -> None:
    """Make `attn_implementation="fm_longctx"` known to transformers. Calling it again changes nothing.

    Raises:
        ValueError: transformers is not installed, or too old to take an attention and a mask function by name.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ValueError(
            "the Hugging Face integration needs transformers 5 or later. Install it with: pip install 'fm_longctx[hf]'."
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, refuse_dense_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    flashmask: FlashMask | None = None,
    context: ContextParallel | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Args:
        query, key, value: `[B, heads, N, D]`, as transformers lays them out; N is this rank's share under `context`.
        flashmask: the mask of the sequences in this call.
        context: group, plan and mask, where the sequences are sharded over ranks. Exactly one of the two.

    Returns:
        out `[B, N, H, D]`, and None for the weights, which never exist.

    Raises:
        ValueError: no mask, two masks, or anything that a FlashMask cannot say.
    """
    if (flashmask is None) == (context is None):
        raise ValueError(
            f'attn_implementation="{NAME}" needs its mask: pass exactly one of flashmask= (a FlashMask) or context= (a '
            f"ContextParallel) to the model's call, got {'neither' if flashmask is None else 'both'}. For plain causal "
            "attention pass flashmask=fm_longctx.mask.builders.causal(length)."
        )
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} cannot be combined with {NAME}: the mask is the one in "
            "flashmask= or context=. Leave attention_mask out and say it there, say with FlashMask.from_dense."
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
    if sliding_window is not None:
        _check_window(flashmask, context, sliding_window)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if context is not None:
        return context_parallel_attention(q, k, v, context, scale=scaling), None
    assert flashmask is not None
    out = flashmask_attention(q, k, v, flashmask, scale=scaling)
    assert isinstance(out, Tensor)
    return out, None


def refuse_dense_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """What transformers calls instead of building a mask: builds none, and refuses what would have been dropped.

    Raises:
        ValueError: a 2-D padding mask that hides a token, or keys from a cache.
    """
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        raise ValueError(
            f"the attention_mask {list(attention_mask.shape)} hides tokens, and {NAME} would drop it. Say it in the "
            "mask instead: make the padding a document of its own in flashmask=, and leave attention_mask out."
        )
    if kv_length != q_length:
        raise ValueError(
            f"{NAME} is for training: {q_length} queries meet {kv_length} keys from a cache, which the mask does not "
            'describe. Pass use_cache=False, or generate with set_attn_implementation("sdpa").'
        )


def _check_window(flashmask: FlashMask | None, context: ContextParallel | None, window: int) -> None:
    """The layer wants a sliding window: accept it only if the mask already hides what lies outside."""
    if context is None:
        assert flashmask is not None
        everywhere = torch.arange(flashmask.num_rows)
        parts = [(flashmask, everywhere, torch.arange(flashmask.num_columns))]
        length = flashmask.num_columns
    else:
        parts = [(stage.mask, context.rows, stage.columns.cpu()) for stage in context.stages]
        length = context.num_tokens
    for mask, rows, columns in parts:
        key = (NAME, "within window", window)
        if key not in mask.cache:
            inside = builders.sliding_window(length, window).select(rows, columns).to(mask.device)
            mask.cache[key] = bool(((mask & inside).area() == mask.area()).all())
        if not mask.cache[key]:
            raise ValueError(
                f"this layer has sliding_window={window}, and the mask shows tokens outside it. One mask serves all "
                "layers. Set sliding_window=None in the model's config, or, where all layers have that window, pass "
                f"mask & sliding_window({length}, {window})."
            )
