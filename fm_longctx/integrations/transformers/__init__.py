"""Hugging Face transformers: `attn_implementation="fm_longctx"`, a packing collator, a Trainer for sharded sequences.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fm_longctx")
    model(tokens, position_ids=positions)                                   # documents, from where positions restart
    model(tokens, position_ids=positions, flashmask=prefix_tree(...))       # any mask
    model(tokens, position_ids=positions, context=ContextParallel(group, plan, mask))   # sequences spread over ranks

A mask travels as a keyword of the model's call, which transformers hands to every attention layer unchanged, under
activation checkpointing too. Whatever cannot be honoured is a ValueError.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_longctx.integrations.transformers.collator import DataCollatorForFlashMask
    from fm_longctx.integrations.transformers.layer import attention
    from fm_longctx.integrations.transformers.registry import NAME, register
    from fm_longctx.integrations.transformers.sequences import (
        dpo_loss,
        reward_loss,
        sequence_log_probs,
        sequence_values,
    )
    from fm_longctx.integrations.transformers.trainer import ContextParallelTrainerMixin

__all__ = [
    "NAME",
    "ContextParallelTrainerMixin",
    "DataCollatorForFlashMask",
    "attention",
    "dpo_loss",
    "register",
    "reward_loss",
    "sequence_log_probs",
    "sequence_values",
]

# Loaded at first use: a collator in a dataloader worker must not import triton or torch.distributed.
_MODULES = {
    "NAME": "registry",
    "ContextParallelTrainerMixin": "trainer",
    "DataCollatorForFlashMask": "collator",
    "attention": "layer",
    "dpo_loss": "sequences",
    "register": "registry",
    "reward_loss": "sequences",
    "sequence_log_probs": "sequences",
    "sequence_values": "sequences",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
