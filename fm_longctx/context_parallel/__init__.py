"""Context parallelism: one sequence over many ranks, under any mask."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_longctx.context_parallel.attention import context_parallel_attention
    from fm_longctx.context_parallel.context import ContextParallel
    from fm_longctx.context_parallel.cost import CostModel
    from fm_longctx.context_parallel.plan import ShardPlan
    from fm_longctx.context_parallel.stages import RankPlan

__all__ = ["ContextParallel", "CostModel", "RankPlan", "ShardPlan", "context_parallel_attention"]

# Loaded at first use: a dataloader worker that plans must not import triton or torch.distributed.
_MODULES = {
    "ContextParallel": "context",
    "CostModel": "cost",
    "RankPlan": "stages",
    "ShardPlan": "plan",
    "context_parallel_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
