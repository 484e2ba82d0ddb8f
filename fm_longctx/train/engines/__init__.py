"""Engines: who holds the parameters and makes an optimizer step of a rank's micro-batches; see docs/engines.md."""

from __future__ import annotations

from fm_longctx.train.config import Config
from fm_longctx.train.engines.base import Engine
from fm_longctx.train.engines.world import World, mesh_world, start_process_group
from fm_longctx.train.step import Task

__all__ = ["Engine", "World", "make_engine", "start"]


def start(config: Config) -> World:
    """Start the process group (unless one is there) and lay the ranks out. Without torchrun: a world of one rank."""
    device = start_process_group(config)
    return mesh_world(config, device)


def make_engine(config: Config, world: World, *, task: Task | None = None) -> Engine:
    """The engine that `parallel.engine` names, with the model's first weights.

    Args:
        task: the loss; next-token prediction if not given.

    Raises:
        ValueError: the engine's library is missing, or it cannot do what the config asks.
    """
    from fm_longctx.train.engines.fsdp import FsdpEngine

    return FsdpEngine(config, world, task=task)
