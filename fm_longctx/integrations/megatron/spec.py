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
    result = copy.deepcopy(spec)
    core = ModuleSpec(module=FlashMaskCoreAttention, params={"sharding": sharding, "without_mask": without_mask})
    if not _swap(result, core):
        raise ValueError(
            f"no self-attention with a core_attention was found in this {type(spec).__name__}. Pass a layer's "
            "ModuleSpec, the TransformerBlockSubmodules of get_gpt_decoder_block_spec, or a multi-token-prediction "
            "block's spec."
        )
    return result


def _swap(node: Any, core: ModuleSpec) -> int:
    """Replace the core attentions at and below a node, in place; how many there were."""
    if isinstance(node, (list, tuple)):
        return sum(_swap(item, core) for item in node)
    if isinstance(node, type) or not dataclasses.is_dataclass(node):
        return 0
    if isinstance(node, CrossAttentionSubmodules):
        raise ValueError(
            "this spec has cross-attention, whose rows and columns are two sequences; a FlashMask here is of one. Swap "
            "the decoder-only layers' specs alone."
        )
    if isinstance(node, MultiTokenPredictionLayerSubmodules):
        mtp.install()
    found = 0
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name == "core_attention" and value is not None:
            name = getattr(get_module(value), "__name__", repr(value))
            if name not in _REPLACEABLE:
                raise ValueError(
                    f"core_attention={name} is not one that FlashMaskCoreAttention can stand in for ({_REPLACEABLE}): "
                    "what it does beyond softmax attention would be lost."
                )
            setattr(node, field.name, core)
            found += 1
        else:
            found += _swap(value, core)
    return found
