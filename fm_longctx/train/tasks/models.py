"""The models of a task, on the meta device: the one that trains, and the frozen one it is compared with."""

from __future__ import annotations

import torch

from fm_longctx.train.config import Config
from fm_longctx.train.memory import weights_dtype
from fm_longctx.train.model import LanguageModel, build
from fm_longctx.train.tasks import lora


def build_model(config: Config) -> LanguageModel:
    """The model that trains: with a score head for rewards, with adapters under `lora`."""
    model = build(
        config.model,
        max_length=config.data.sequence_length,
        loss_chunk=config.train.loss_chunk,
        dtype=weights_dtype(config.train),
        score_head=config.task.kind == "reward",
    )
    if config.lora.r is not None:
        lora.add_adapters(model.causal_lm, config.lora, frozen_dtype=_frozen_dtype(config))
    return model


def build_reference(config: Config) -> LanguageModel:
    """A frozen copy of the model as it is at the start, for preferences without adapters."""
    model = build(
        config.model,
        max_length=config.data.sequence_length,
        loss_chunk=config.train.loss_chunk,
        dtype=_frozen_dtype(config),
    )
    return model.requires_grad_(False)


def _frozen_dtype(config: Config) -> torch.dtype:
    """Of weights that do not train: the one they are computed in, for nobody updates a finer copy."""
    return torch.float32 if config.train.precision == "float32" else torch.bfloat16
