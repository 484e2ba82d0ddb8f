"""What a Megatron configuration may not ask of `FlashMaskCoreAttention`: a ValueError instead of a wrong result."""

from __future__ import annotations

import warnings
from typing import Any

TESTED = "0.16.1"


def check_version() -> None:
    """Warn, once, where Megatron-Core is not of the series that the tests run against."""
    from megatron.core import __version__

    if __version__.split(".")[:2] != TESTED.split(".")[:2]:
        warnings.warn(
            f"fm_longctx's Megatron integration is tested with megatron-core {TESTED} and this is {__version__}: "
            "compare a few steps with plain attention before you trust it.",
            stacklevel=2,
        )


def check_config(
    config: Any,
    *,
    attention_type: str,
    attention_dropout: float | None,
    cp_comm_type: Any,
    sharding: str,
    without_mask: str,
    cp_size: int,
) -> None:
    """Raise a ValueError for whatever of the configuration the attention could only ignore."""
    if attention_type != "self":
        raise ValueError(
            f"FlashMaskCoreAttention is self-attention, got attention_type={attention_type!r}: rows and columns of a "
            "mask are positions of one sequence. Keep Megatron's core attention in cross-attention layers."
        )
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported. Set attention_dropout=0.0 (--attention-dropout 0.0); "
            "Megatron's default is 0.1."
        )
    stages = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if without_mask == "causal" and (stages[0] > 2 or stages[1] is not None):
        raise ValueError(
            f'without_mask="causal" with {stages[0]} pipeline stages (virtual: {stages[1]}) is not supported: scripts '
            "hand a batch's mask to the first and the last stage only, and the others would silently attend causally. "
            'Pass FlashMaskParams.build(causal(N), sharding="zigzag") on every stage instead.'
        )
    for name, value, remedy in _unsupported(config):
        raise ValueError(f"{name}={value!r} is not supported by FlashMaskCoreAttention. {remedy}")
    for comm_type in cp_comm_type if isinstance(cp_comm_type, list) else [cp_comm_type]:
        if cp_size > 1 and comm_type not in (None, "p2p"):
            raise ValueError(
                f"cp_comm_type={cp_comm_type!r} chooses among TransformerEngine's exchanges, which are not used here: "
                "each rank receives the keys that its rows see. Leave cp_comm_type at its default."
            )
    if cp_size > 1 and not config.calculate_per_token_loss:
        text = (
            "context-parallel ranks of packed documents hold unequal numbers of labels, and without "
            "calculate_per_token_loss=True (--calculate-per-token-loss) Megatron weighs the ranks equally."
        )
        if sharding == "plan":
            raise ValueError(f"{text} Set it, and return per_token_loss's three values from the loss function.")
        warnings.warn(f"{text} This is as it was before the spec was changed.", stacklevel=2)


def _unsupported(config: Any) -> list[tuple[str, Any, str]]:
    """Name, value and remedy of each option that is set and cannot be honoured."""
    found: list[tuple[str, Any, str]] = []

    def refuse(name: str, allowed: tuple[Any, ...], remedy: str) -> None:
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            found.append((name, value, remedy))

    refuse("softmax_type", ("vanilla",), 'Softmax sinks are not supported: set softmax_type="vanilla".')
    refuse("qk_clip", (False,), "The largest logits are never formed. Set it to False.")
    refuse("log_max_attention_logit", (False,), "The largest logits are never formed. Set it to False.")
    refuse("fp8_dot_product_attention", (False,), "Attention runs in bf16, fp16 or fp32. Set it to False.")
    refuse("fp8_multi_head_attention", (False,), "Attention runs in bf16, fp16 or fp32. Set it to False.")
    refuse(
        "experimental_attention_variant",
        (None,),
        "It is another attention than softmax(scale * q k^T) v. Keep Megatron's own core attention for it.",
    )
    refuse(
        "cuda_graph_impl",
        ("none",),
        'A captured graph would keep the first batch\'s mask for all others. Set cuda_graph_impl="none".',
    )
    refuse("hybrid_context_parallel", (False,), "Its groups change with the batch. Use context_parallel_size alone.")
    refuse("batch_invariant_mode", (False,), "The order of additions follows the plan. Set it to False.")
    if config.fine_grained_activation_offloading and "core_attn" in (config.offload_modules or []):
        found.append(("offload_modules", config.offload_modules, 'Take "core_attn" out of it.'))
    return found
