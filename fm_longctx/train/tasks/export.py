"""A trained model's adapters as a folder that peft reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fm_longctx.train.config import Config
from fm_longctx.train.engines.base import Engine
from fm_longctx.train.tasks import lora


def export_adapters(engine: Engine, config: Config, out: Path) -> None:
    """Write adapters, and a reward model's score head, from a model in training. A collective; rank 0 writes."""
    kept: dict[str, Tensor] = {}
    for name, weight in engine.weights():
        if engine.world.rank == 0 and lora.is_exported(name):
            kept[name] = weight
    if engine.world.rank == 0:
        lora.export(out, config.lora, kept, base=config.model.path)
