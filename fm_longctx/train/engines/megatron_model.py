"""A Hugging Face Llama or Qwen3 as Megatron-Core's `GPTModel`: the same function, split over tensor ranks, stages."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from fm_longctx.integrations.megatron import use_flashmask, use_position_ids
from fm_longctx.train.config import Config

SHAPES = ("llama", "qwen3")

# Scalings of RoPE that change its frequencies alone, whatever the length.
_ROPE_TYPES = ("default", "linear", "llama3")


def have_transformer_engine() -> bool:
    """Whether Megatron's fused modules can be used; else its local ones."""
    return find_spec("transformer_engine") is not None


def check_model(hf_config: Any, config: Config) -> None:
    """Raise a ValueError for what of the model or the run `GPTModel` could not honour."""
    parallel = config.parallel
    if hf_config.model_type not in SHAPES:
        raise ValueError(
            f"parallel.engine: megatron knows models of type {' and '.join(SHAPES)}, and this one is of type "
            f"{hf_config.model_type}. Set parallel.engine to fsdp."
        )
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(hf_config, name, False):
            raise ValueError(f"parallel.engine: megatron has no weights for {name}: true. Set parallel.engine to fsdp.")
    rope = hf_config.rope_parameters["rope_type"]
    if rope not in _ROPE_TYPES:
        raise ValueError(
            f"parallel.engine: megatron takes RoPE of type {', '.join(_ROPE_TYPES)}, and this model has {rope}. Set "
            "parallel.engine to fsdp."
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(hf_config, name) % parallel.tensor:
            raise ValueError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {name}={getattr(hf_config, name)}. Set "
                "it to a divisor, or to 1."
            )
    if hf_config.num_hidden_layers % parallel.pipeline:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} does not divide the model's num_hidden_layers="
            f"{hf_config.num_hidden_layers}. Set it to a divisor, or to 1."
        )
    if parallel.pipeline > 1 and config.data.sequence_length % parallel.context:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} needs context ranks with equally many tokens, and "
            f"parallel.context={parallel.context} does not divide data.sequence_length={config.data.sequence_length}."
        )


def megatron_config(hf_config: Any, config: Config, device: torch.device) -> TransformerConfig:
    """The model and its parallelism in Megatron's words."""
    parallel = config.parallel
    bf16 = config.train.precision == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    recompute: dict[str, Any] = {}
    if config.train.activation_checkpointing == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=hf_config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        qk_layernorm=hf_config.model_type == "qwen3",
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        use_cpu_initialization=device.type == "cpu",
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        # Ranks hold unequal numbers of labels.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **recompute,
    )


def build_stage(hf_config: Any, settings: TransformerConfig, *, max_length: int, rope: Any) -> GPTModel:
    """This rank's stage of the model, with weights that are still to be filled.

    Args:
        rope: the Hugging Face model's rotary embedding, whose frequencies it takes over.
    """
    if have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=settings.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=settings.qk_layernorm, normalization="RMSNorm")
    model = GPTModel(
        settings,
        use_flashmask(spec),
        vocab_size=hf_config.vocab_size,
        max_sequence_length=max_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
    )
    model.rotary_pos_emb.inv_freq.copy_(rope.inv_freq)
    return use_position_ids(model)
