"""Where a run starts: what can be refused beforehand, the checkpoint to go on from, the run folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fm_longctx.train import checkpoint, inputs
from fm_longctx.train.config import Config
from fm_longctx.train.config_load import to_yaml
from fm_longctx.train.model import huggingface_config


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where to go on from."""

    path: Path
    state: checkpoint.RunState


def prepare(config: Config, ranks: int) -> Resume | None:
    """Everything that can be refused before a process group exists. Every rank calls it and comes to the same answer.

    Returns:
        the checkpoint to go on from, if there is one.

    Raises:
        ValueError: see `Config.check_world`, `inputs.check`, `checkpoint.inspect`; or the folder holds a run already.
    """
    config.check_world(ranks)
    inputs.check(config)
    folder = Path(config.train.folder)
    path = None
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        if config.train.if_exists == "refuse":
            raise ValueError(
                f"{folder} holds a run already. Continue it with --train.if_exists resume, start over with "
                "--train.if_exists replace, or choose another --train.folder."
            )
        if config.train.if_exists == "resume":
            path = checkpoint.latest(folder / "checkpoints")
    if path is None and config.checkpoint.load is not None:
        path = Path(config.checkpoint.load).expanduser()
    if path is None:
        return None
    hf_config = huggingface_config(config.model, max_length=config.data.sequence_length)
    return Resume(path=path, state=checkpoint.inspect(path, hf_config))


def open_folder(folder: Path, config: Config) -> None:
    """Make the run folder and write the resolved config; under `replace`, remove what an earlier run wrote."""
    if config.train.if_exists == "replace":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in ("metrics.jsonl", "mask.png", "config.yaml"):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
