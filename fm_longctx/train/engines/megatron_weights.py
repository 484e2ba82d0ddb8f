"""Weights between Hugging Face's Llama and Qwen3 and Megatron-Core's `GPTModel`.

Megatron joins the projections of queries, keys and values, group by group (a key head with the queries that share it),
and those of the gated MLP; a tensor rank has some of the groups, and its part of each half of the MLP's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Megatron's name within a layer, with its local modules or TransformerEngine's fused ones, to Hugging Face's.
_IN_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_SPLIT_BY_ROWS = ("word_embeddings", "output_layer", "linear_qkv.weight", "linear_fc1.weight")
_SPLIT_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter of a `GPTModel`: which of Hugging Face's it is made of, and how."""

    names: tuple[str, ...]
    """Hugging Face's."""
    kind: Literal["same", "qkv", "gated"]
    """How they are joined."""
    dim: int | None
    """Which dim tensor ranks split; None: each has it whole."""


def entry(name: str, *, first_layer: int, tied: bool) -> Entry:
    """What a parameter of a pipeline stage is.

    Args:
        name: in the stage's `named_parameters`.
        first_layer: the stage's first layer, counted over the whole model.
        tied: whether the output projection is the embedding.
    """
    dim = 0 if any(part in name for part in _SPLIT_BY_ROWS) else None
    if any(part in name for part in _SPLIT_BY_COLUMNS):
        dim = 1
    if name in _OUTSIDE:
        known = _OUTSIDE["embedding.word_embeddings.weight" if tied and name.startswith("output") else name]
        return Entry(names=(known,), kind="same", dim=dim)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _IN_LAYER:
        raise ValueError(f"Megatron's parameter {name} has no counterpart in a Hugging Face Llama or Qwen3.")
    names = tuple(f"model.layers.{first_layer + int(match[1])}.{x}" for x in _IN_LAYER[match[2]])
    kind: Literal["same", "qkv", "gated"] = {1: "same", 2: "gated", 3: "qkv"}[len(names)]  # type: ignore[assignment]
    return Entry(names=names, kind=kind, dim=dim)


def to_megatron(e: Entry, get: Callable[[str], Tensor], *, groups: int, rank: int, size: int) -> Tensor:
    """A tensor rank's part of a parameter.

    Args:
        get: a whole weight by its Hugging Face name.
        groups: key/value heads of the model.
        rank, size: among the tensor ranks.
    """
    parts = [get(name) for name in e.names]
    if e.kind == "qkv":
        parts = [x.unflatten(0, (groups, -1)) for x in parts]  # [groups, rows of a group, C]
        return torch.cat(parts, dim=1).chunk(size)[rank].flatten(0, 1)
    if e.dim is None:
        return parts[0]
    return torch.cat([x.chunk(size, e.dim)[rank] for x in parts], dim=e.dim)


def from_megatron(e: Entry, parts: Sequence[Tensor], *, groups: int, queries: int) -> list[Tensor]:
    """The whole Hugging Face weights, in the order of `e.names`, from all tensor ranks' parts of a parameter.

    Args:
        groups, queries: key/value heads and query heads of the model.
    """
    if e.kind == "qkv":
        whole = torch.cat(list(parts))
        each = queries // groups  # query heads of a group, beside one of keys and one of values
        joined = whole.unflatten(0, (groups, each + 2, -1))
        return [x.flatten(0, 2) for x in joined.split((each, 1, 1), dim=1)]
    if e.kind == "gated":
        halves = [x.chunk(2) for x in parts]
        return [torch.cat([half[i] for half in halves]) for i in (0, 1)]
    return [parts[0] if e.dim is None else torch.cat(list(parts), dim=e.dim)]
