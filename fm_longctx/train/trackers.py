"""TensorBoard and Weights & Biases: the figures of metrics.jsonl, where people look at them. Rank 0 only."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fm_longctx.train.config import Config


class Tracker(Protocol):
    """Something that is told figures by name, step by step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_trackers(folder: Path, config: Config, *, start: int) -> list[Tracker]:
    """What the `log` section asks for. `start`: steps done, from which a resumed run goes on.

    Raises:
        ValueError: the library is missing.
    """
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", start=start))
    if config.log.wandb != "off":
        trackers.append(WeightsAndBiases(folder, config))
    return trackers


def check_libraries(config: Config) -> None:
    """Raise a ValueError if a library that the `log` section needs is missing; before any rank has started."""
    if config.log.tensorboard:
        _tensorboard()
    if config.log.wandb != "off":
        _wandb()


class TensorBoard:
    """Event files in a folder; of a resumed run TensorBoard hides the steps that are done again."""

    def __init__(self, folder: Path, *, start: int) -> None:
        self.writer = _tensorboard().SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run there. Its id is kept in wandb_id of the run folder, so that a resumed run goes on with it."""

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = _wandb()
        noted = folder / "wandb_id"
        if not noted.exists():
            noted.write_text(wandb.util.generate_id())
        self.run = wandb.init(
            project=config.log.wandb_project,
            name=config.log.wandb_name or folder.name,
            id=noted.read_text().strip(),
            resume="allow",
            mode=config.log.wandb,
            dir=str(folder),
            config=dataclasses.asdict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def close(self) -> None:
        self.run.finish()


def _tensorboard() -> Any:
    return _library("torch.utils.tensorboard", key="log.tensorboard", package="tensorboard", off="false")


def _wandb() -> Any:
    return _library("wandb", key="log.wandb", package="wandb", off="off")


def _library(module: str, *, key: str, package: str, off: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{key} needs the {package} package: pip install {package}, or set {key} to {off}.") from error
