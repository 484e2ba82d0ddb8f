"""Megatron's core attention under a FlashMask."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from fm_longctx import ContextParallel, context_parallel_attention
from fm_longctx.integrations.megatron.megatron_batches import causal_context, dense_context, thd_context
from fm_longctx.integrations.megatron.params import FlashMaskParams, Sharding
from fm_longctx.integrations.megatron.refusals import check_config, check_version
from fm_longctx.integrations.megatron.window import Window, layer_window

WithoutMask = Literal["raise", "causal"]


class FlashMaskCoreAttention(MegatronModule):
    """Drop-in for `core_attention` in a layer spec: `DotProductAttention`'s interface, `TEDotProductAttention`'s reach.

    `use_flashmask(spec)` puts it there. It holds no parameters, so checkpoints stay as they are. Rows that see nothing
    give 0.

    Args:
        config ... pg_collection: what Megatron passes.
        k_channels, v_channels: head dimensions of queries and keys, and of values, from MLA.
        sharding, without_mask: as in `use_flashmask`.

    Raises:
        ValueError: a configuration that could only be ignored; see docs/megatron.md for all.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: Any = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        *,
        sharding: Sharding = "plan",
        without_mask: WithoutMask = "raise",
    ) -> None:
        super().__init__(config=config)
        check_version()
        group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        self.cp_size = dist.get_world_size(group)
        self.cp_group = group if self.cp_size > 1 else None
        check_config(
            config,
            attention_type=attention_type,
            attention_dropout=attention_dropout,
            cp_comm_type=cp_comm_type,
            sharding=sharding,
            without_mask=without_mask,
            cp_size=self.cp_size,
        )
        self.attn_mask_type = attn_mask_type
        self.sharding, self.without_mask = sharding, without_mask
        self.window: Window | None = layer_window(config, layer_number)
        head_dim = config.kv_channels if k_channels is None else k_channels
        self.softmax_scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's rows, in Megatron's layout.

        Args:
            query: `[T, b, np, hn]` (thd: `[T, np, hn]`), this rank's rows and heads, RoPE applied.
            key, value: `[T, b, ng, hn]` and `[T, b, ng, hv]`, not expanded to the query heads.
            attention_mask: None; under sharding="zigzag" also bool `[b, 1, T, N]`, True = masked.
            attn_mask_type: which rule holds inside the documents of a thd batch.
            packed_seq_params: `FlashMaskParams`; under sharding="zigzag" also Megatron's own with `qkv_format="thd"`.

        Returns:
            `[T, b, np * hv]` (thd: `[T, np * hv]`).

        Raises:
            ValueError: no mask, two masks, or anything that a FlashMask cannot say.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported: a FlashMask hides or shows, it adds nothing to scores.")
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"{query.shape[0]} queries meet {key.shape[0]} keys: FlashMaskCoreAttention is for training, without a "
                "key-value cache. Build the model from the unchanged spec for inference; its checkpoints are the same."
            )
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        context = self._context(query, attention_mask, mask_type, packed_seq_params)
        thd = query.ndim == 3
        q, k, v = (x.unsqueeze(0) if thd else x.transpose(0, 1) for x in (query, key, value))
        options = {"scale": self.softmax_scale, "deterministic": self.config.deterministic_mode}
        out = context_parallel_attention(q, k, v, context, **options)
        return (out.squeeze(0) if thd else out.transpose(0, 1)).flatten(-2)

    def _context(
        self,
        query: Tensor,
        attention_mask: Tensor | None,
        mask_type: AttnMaskType,
        params: PackedSeqParams | None,
    ) -> ContextParallel:
        if params is not None and attention_mask is not None:
            raise ValueError(
                "the batch brings an attention_mask and packed_seq_params, and one of them would be dropped. Pass None "
                "as attention_mask."
            )
        if isinstance(params, FlashMaskParams):
            return self._of_params(params)
        if self.sharding == "plan":
            what = "none" if params is None else f"a {type(params).__name__}"
            raise ValueError(
                "FlashMaskCoreAttention needs its mask in packed_seq_params: pass FlashMaskParams to the model's call "
                f"on every pipeline stage, got {what}{'' if attention_mask is None else ' and an attention_mask'}. For "
                'Megatron\'s own batches and sharding use use_flashmask(spec, sharding="zigzag").'
            )
        return self._of_megatron_batch(query, attention_mask, mask_type, params)

    def _of_params(self, params: FlashMaskParams) -> ContextParallel:
        context = params.context
        if context.world_size != self.cp_size:
            raise ValueError(
                f"the FlashMaskParams are for {context.world_size} context-parallel ranks, but the layer has "
                f"{self.cp_size}."
            )
        uneven = len(context.rows) * context.world_size != context.num_tokens
        if uneven and self.config.pipeline_model_parallel_size > 1 and not self.config.variable_seq_lengths:
            raise ValueError(
                f"{context.num_tokens} positions are shared unevenly by {context.world_size} ranks, and pipeline "
                "stages expect equal parts. Pad the sequence to a multiple, or set variable_seq_lengths=True."
            )
        if self.window is None:
            return context
        if params.window_context is None or params.window != self.window:
            raise ValueError(
                f"this layer has window_size={self.window}, but the FlashMaskParams were built with "
                f"window_size={params.window}. Pass window_size=config.window_size to FlashMaskParams.build, or set it "
                "to None in the config."
            )
        return params.window_context

    def _of_megatron_batch(
        self, query: Tensor, attention_mask: Tensor | None, mask_type: AttnMaskType, params: PackedSeqParams | None
    ) -> ContextParallel:
        tokens, window, group = query.shape[0], self.window, self.cp_group
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if params is not None:
            if params.qkv_format != "thd" or params.local_cp_size is not None or params.cp_group is not None:
                raise ValueError(
                    f"packed_seq_params with qkv_format={params.qkv_format!r} and a context-parallel group of its own "
                    '(hybrid context parallelism) are not supported. Pass a "thd" batch or FlashMaskParams.'
                )
            if not causal and mask_type != AttnMaskType.padding:
                raise ValueError(
                    f"attn_mask_type={mask_type.name} does not say what a thd batch's rows see in their document. Use "
                    "causal, padding_causal or padding (all of it)."
                )
            return thd_context(params, tokens, causal=causal, window=window, group=group, device=query.device)
        if attention_mask is not None:
            return dense_context(attention_mask, query.shape[1], tokens, window=window, group=group)
        if self.without_mask == "causal" and mask_type == AttnMaskType.causal:
            return causal_context(tokens, window=window, group=group, device=query.device)
        raise ValueError(
            f"the batch brings no mask (attn_mask_type={mask_type.name}): neither FlashMaskParams, nor a thd batch, "
            "nor an attention_mask. Pass one on every pipeline stage; if plain causal attention is meant, say so with "
            'use_flashmask(spec, sharding="zigzag", without_mask="causal").'
        )
