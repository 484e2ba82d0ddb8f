"""The loss of a config's task and, for preferences, the reference it compares with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fm_longctx.train.config import Config
from fm_longctx.train.engines.fsdp import parameter_mesh, shard
from fm_longctx.train.engines.world import World
from fm_longctx.train.model import LanguageModel, materialize
from fm_longctx.train.step import NextToken, Task
from fm_longctx.train.tasks import lora
from fm_longctx.train.tasks.models import build_reference
from fm_longctx.train.tasks.task import Preference, Reward


def make_task(config: Config, world: World) -> Task:
    """The loss. A collective where it has a reference model, which is sharded like the one that trains."""
    group = world.cp_group if world.cp_size > 1 else None
    if config.task.kind == "dpo":
        return Preference(config.task, group, reference=_reference(config, world), chunk=config.train.loss_chunk)
    if config.task.kind == "reward":
        return Reward(config.task, group)
    return NextToken()


def _reference(config: Config, world: World) -> Callable[[Any], AbstractContextManager[Any]] | None:
    if config.task.reference == "records":
        return None
    if config.lora.r is not None:
        return lora.without_adapters
    model = build_reference(config)
    shard(model, config, parameter_mesh(config, world))
    materialize(model, config.model, device=world.device, seed=config.train.seed)

    @contextmanager
    def frozen(_: Any) -> Iterator[LanguageModel]:
        yield model
        # What the output projection kept gathered for a backward that does not come.
        model.reshard()  # type: ignore[operator]

    return frozen
