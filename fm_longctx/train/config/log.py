"""The `log` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where a step's figures go besides metrics.jsonl, which always has them."""

    tensorboard: bool = False
    """Write them for TensorBoard too, into train.folder/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send them to Weights & Biases, or (offline) keep them in train.folder/wandb for `wandb sync`."""
    wandb_project: str = "fm_longctx"
    """The project there."""
    wandb_name: str | None = None
    """The run's name there. None: the last part of train.folder."""
