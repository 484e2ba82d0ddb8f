"""Engines: who holds the parameters and makes an optimizer step of a rank's micro-batches; see docs/engines.md."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fm_longctx.train.config import Config
from fm_longctx.train.engines.base import Engine
from fm_longctx.train.engines.world import World, mesh_world, start_process_group
from fm_longctx.train.step import Task

__all__ = ["Engine", "World", "make_engine", "start"]


def start(config: Config) -> World:
    """Start the process group (unless one is there) and lay the ranks out. Without torchrun: a world of one rank.

    Raises:
        ValueError: the device or the engine's library is missing.
    """
    device = start_process_group(config)
    if config.parallel.engine == "megatron":
        return _megatron().megatron_world(config, device)
    return mesh_world(config, device)


def make_engine(config: Config, world: World, *, task: Task | None = None) -> Engine:
    """The engine that `parallel.engine` names, with the model's first weights.

    Args:
        world: as `start` gave it.
        task: the loss; that of the config's task section if not given.

    Raises:
        ValueError: the engine's library is missing, or it cannot do what the config asks.
    """
    from fm_longctx.train.tasks.setup import make_task

    task = task or make_task(config, world)
    # Each imports its library, which may be missing and takes seconds.
    if config.parallel.engine == "deepspeed":
        from fm_longctx.train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, world, task=task)
    if config.parallel.engine == "megatron":
        engine: Engine = _megatron().MegatronEngine(config, world, task=task)
        return engine
    from fm_longctx.train.engines.fsdp import FsdpEngine

    return FsdpEngine(config, world, task=task)


def _megatron() -> Any:
    try:
        return import_module("fm_longctx.train.engines.megatron")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "megatron":
            raise
        raise ValueError(
            "parallel.engine: megatron needs megatron-core 0.16. Install it with: pip install 'fm_longctx[megatron]'."
        ) from error
