"""Megatron-Core: any FlashMask in any layer spec, under context, tensor, sequence and pipeline parallelism.

    spec = use_flashmask(get_gpt_layer_with_transformer_engine_spec())       # the layer spec
    model = use_position_ids(GPTModel(config, spec, ...))                    # RoPE from position ids
    params = FlashMaskParams.from_cu_seqlens(cu_seqlens)                     # every micro-batch, on every rank
    batch = params.shard_batch(batch)                                        # instead of get_batch_on_this_cp_rank
    losses = model(tokens, position_ids, None, labels=labels, packed_seq_params=params)

With `use_flashmask(spec, sharding="zigzag")` Megatron's own sharding and positions stay, and a script changes nothing
but its layer spec; see docs/megatron.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_longctx.integrations.megatron.core_attention import FlashMaskCoreAttention
    from fm_longctx.integrations.megatron.loss import per_token_loss
    from fm_longctx.integrations.megatron.params import FlashMaskParams
    from fm_longctx.integrations.megatron.positions import use_position_ids
    from fm_longctx.integrations.megatron.spec import use_flashmask

__all__ = ["FlashMaskCoreAttention", "FlashMaskParams", "per_token_loss", "use_flashmask", "use_position_ids"]

# Loaded at first use: Megatron-Core is an optional dependency and takes seconds to import.
_MODULES = {
    "FlashMaskCoreAttention": "core_attention",
    "FlashMaskParams": "params",
    "per_token_loss": "loss",
    "use_flashmask": "spec",
    "use_position_ids": "positions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "megatron":
            raise
        raise ValueError(
            "the Megatron integration needs megatron-core 0.16. Install it with: pip install 'fm_longctx[megatron]'."
        ) from error
