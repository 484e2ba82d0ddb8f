"""Put `FlashMaskCoreAttention` into a layer spec."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

from megatron.core.transformer.attention import CrossAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from fm_longctx.integrations.megatron import mtp
from fm_longctx.integrations.megatron.core_attention import FlashMaskCoreAttention, WithoutMask
from fm_longctx.integrations.megatron.params import Sharding

Spec = TypeVar("Spec")

# The core attentions that compute softmax(scale * q k^T) v; another kind must not be dropped for it.
_REPLACEABLE = ("DotProductAttention", "TEDotProductAttention", "FlashMaskCoreAttention")


def use_flashmask(spec: Spec, *, sharding: Sharding = "plan", without_mask: WithoutMask = "raise") -> Spec:
    """A copy of a spec in which every self-attention's core is `FlashMaskCoreAttention`.

        spec = use_flashmask(get_gpt_layer_with_transformer_engine_spec())

    Args:
        spec: a layer's `ModuleSpec` (local, TransformerEngine, MLA, MoE), block submodules
            (`get_gpt_decoder_block_spec`), or a multi-token-prediction (MTP) block's. Once an MTP spec has passed
            through here, MTP shifts tokens within documents for batches with `FlashMaskParams`.
        sharding: "plan": every batch brings `FlashMaskParams`. "zigzag": Megatron's own batches are understood too,
            under Megatron's own sharding: thd batches, and dense attention masks.
        without_mask: what to do, under "zigzag", with a batch that brings no mask at all: "raise", or plain "causal".

    Raises:
        ValueError: a spec without a self-attention, with cross-attention, or with a core attention of another kind.
    """
    for name, value, allowed in (
        ("sharding", sharding, ("plan", "zigzag")),
        ("without_mask", without_mask, ("raise", "causal")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
    if without_mask == "causal" and sharding == "plan":
        raise ValueError('without_mask="causal" needs sharding="zigzag": a batch without a mask has no plan to follow.')
    core = ModuleSpec(module=FlashMaskCoreAttention, params={"sharding": sharding, "without_mask": without_mask})
    result: Spec = _swapped(spec, core)
    if result is spec:
        raise ValueError(
            f"no self-attention with a core_attention was found in this {type(spec).__name__}. Pass a layer's "
            "ModuleSpec, the TransformerBlockSubmodules of get_gpt_decoder_block_spec, or a multi-token-prediction "
            "block's spec."
        )
    return result


def _swapped(node: Any, core: ModuleSpec) -> Any:
    """The node with the core attentions at and below it replaced, in copies; the node itself if there are none."""
    if isinstance(node, (list, tuple)):
        items = [_swapped(item, core) for item in node]
        return node if all(new is old for new, old in zip(items, node, strict=True)) else type(node)(items)
    if isinstance(node, type) or not dataclasses.is_dataclass(node):
        return node
    if isinstance(node, CrossAttentionSubmodules):
        raise ValueError(
            "this spec has cross-attention, whose rows and columns are two sequences; a FlashMask here is of one. Swap "
            "the decoder-only layers' specs alone."
        )
    if isinstance(node, MultiTokenPredictionLayerSubmodules):
        mtp.install()
    result = copy.copy(node)
    changed = False
    for field in dataclasses.fields(node):
        old = getattr(node, field.name)
        if field.name == "core_attention" and old is not None:
            new = _replaced(old, core)
        else:
            new = _swapped(old, core)
        if new is not old:
            setattr(result, field.name, new)
            changed = True
    return result if changed else node


def _replaced(attention: Any, core: ModuleSpec) -> ModuleSpec:
    name = getattr(get_module(attention), "__name__", repr(attention))
    if name not in _REPLACEABLE:
        raise ValueError(
            f"core_attention={name} is not one that FlashMaskCoreAttention can stand in for ({_REPLACEABLE}): what it "
            "does beyond softmax attention would be lost."
        )
    return core
