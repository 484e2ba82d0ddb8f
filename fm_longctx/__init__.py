"""Long-context attention under any interval mask, on one GPU or many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_longctx.attention import flashmask_attention
    from fm_longctx.context_parallel import ContextParallel, ShardPlan, context_parallel_attention
    from fm_longctx.mask import FlashMask

__version__ = "0.1.0"
__all__ = ["ContextParallel", "FlashMask", "ShardPlan", "context_parallel_attention", "flashmask_attention"]

# Loaded at first use: a dataloader worker that builds masks and plans must not import triton or torch.distributed.
_ROOMS = {
    "ContextParallel": "fm_longctx.context_parallel",
    "FlashMask": "fm_longctx.mask",
    "ShardPlan": "fm_longctx.context_parallel",
    "context_parallel_attention": "fm_longctx.context_parallel",
    "flashmask_attention": "fm_longctx.attention",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'fm_longctx' has no attribute {name!r}")
