"""Where a run starts: what can be refused beforehand, the checkpoint to go on from, the run folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fm_longctx.train import checkpoint, inputs, records, trackers
from fm_longctx.train.config import Config
from fm_longctx.train.config_load import to_yaml
from fm_longctx.train.model import huggingface_config

# What a run writes into its folder, and "replace" removes.
_FILES = ("config.yaml", "metrics.jsonl", "mask.png", "eval.jsonl", "eval.png", "wandb_id")
_FOLDERS = ("checkpoints", "export", "faults", "memory", "profile", "starts", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where to go on from."""

    path: Path
    state: checkpoint.RunState
    damaged: Mapping[Path, str] = field(default_factory=dict)
    """Newer checkpoints of the run that cannot be read, and why."""


def prepare(config: Config, ranks: int) -> Resume | None:
    """Everything that can be refused before a process group exists. Every rank calls it and comes to the same answer.

    Returns:
        the checkpoint to go on from, if there is one.

    Raises:
        ValueError: see `Config.check_world`, `inputs.check`, `checkpoint.inspect`; a library is missing; or the folder
            holds a run already.
    """
    config.check_world(ranks)
    inputs.check(config)
    if config.eval.every is not None:
        inputs.check(replace(config, data=config.eval.data(config.data)))
    trackers.check_libraries(config)
    folder = Path(config.train.folder)
    hf_config = huggingface_config(config.model, max_length=config.data.sequence_length)
    engine = config.parallel.engine
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        if config.train.if_exists == "refuse" and not restarted():
            raise ValueError(
                f"{folder} holds a run already. Continue it with --train.if_exists resume, start over with "
                "--train.if_exists replace, or choose another --train.folder."
            )
        if config.train.if_exists == "resume" or restarted():
            found = checkpoint.newest_good(folder / "checkpoints", hf_config, engine)
            if found is not None:
                return Resume(path=found[0], state=found[1], damaged=found[2])
    if config.checkpoint.load is None:
        return None
    path = Path(config.checkpoint.load).expanduser()
    return Resume(path=path, state=checkpoint.inspect(path, hf_config, engine))


def restarted() -> bool:
    """Whether torchrun has started these ranks again after a failure: then the run in the folder is this one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def open_folder(folder: Path, config: Config, resume: Resume | None) -> None:
    """Make the run folder and write what the run is; under `replace`, remove what an earlier run wrote. On rank 0.

    Checkpoints that were found damaged get a name that says so, and are not looked at again.
    """
    if config.train.if_exists == "replace" and not restarted():
        for name in _FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    records.write(folder, config, step=0 if resume is None else resume.state.step)
    for path in resume.damaged if resume is not None else ():
        shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
        path.rename(path.with_suffix(".damaged"))


def tokenizer_folder(config: Config) -> str | None:
    """The folder of the run's tokenizer, if it has files of its own; an export copies them."""
    path = config.model.path if config.data.tokenizer == "bytes" else config.data.tokenizer
    return None if path is None else str(Path(path).expanduser().resolve())
