"""Checkpoints: what they hold, which one is good, and loading it. `checkpoint_writer` writes them.

    <run>/checkpoints/step_00000020/     DCP files (.metadata, *.distcp) and run.json
    <run>/checkpoints/*.partial          being written, or left by a kill; never read, and removed by the next save
    <run>/checkpoints/*.damaged          found cut short when the run was resumed; never read

A checkpoint is complete if its folder has its final name, which it gets only when every rank is done, and every file is
as long as run.json says. The newest complete one is in force. Another number of ranks can load it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from fm_longctx.train.engines import Engine

FORMAT = 2


class DamagedCheckpoint(ValueError):
    """A checkpoint that lacks something or cannot be read; an older one may do."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint says besides tensors; run.json."""

    step: int
    """Steps done."""
    data: dict[str, Any]
    """The loader's state, the same on every rank."""
    model: dict[str, Any]
    """The whole Hugging Face config of the model."""
    ranks: int
    """How many ranks wrote it."""
    engine: str
    """Which engine wrote it."""
    watch: dict[str, Any]
    """What `faults.Watch` remembers of the steps before."""
    tokenizer: str | None
    """The folder of the tokenizer's files, if it has any."""


_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def config_of(hf_config: Any) -> dict[str, Any]:
    """A Hugging Face config as plain values, as JSON would give them back."""
    return dict(json.loads(json.dumps(hf_config.to_dict())))


def complete(folder: Path) -> list[Path]:
    """The checkpoints under a run's checkpoints folder that were written to their end, the newest first."""
    found = [p for p in folder.glob("step_*") if not p.suffix and (p / "run.json").is_file()]
    return sorted(found, reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest of them, if there is any. Whether its bytes are still all there is `inspect`'s to say."""
    return next(iter(complete(folder)), None)


def newest_good(folder: Path, hf_config: Any, engine: str) -> tuple[Path, RunState, dict[Path, str]] | None:
    """The newest checkpoint of a run that passes `inspect`, its state, and what is wrong with the newer ones.

    None if the run has written none.

    Raises:
        ValueError: there are some and all are damaged, or the first good one is another model's.
    """
    wrong: dict[Path, str] = {}
    for path in complete(folder):
        try:
            return path, inspect(path, hf_config, engine), wrong
        except DamagedCheckpoint as error:
            wrong[path] = str(error)
    if wrong:
        raise ValueError(
            f"no checkpoint under {folder} can be read: {' '.join(wrong.values())} Name one of another run with "
            "--checkpoint.load, or start over with --train.if_exists replace."
        )
    return None


def read_state(path: Path) -> RunState:
    """run.json of a checkpoint.

    Raises:
        DamagedCheckpoint: it is not there, not readable, or of another format.
    """
    content = _read(path)
    return RunState(**{name: content[name] for name in RunState.__dataclass_fields__})


def inspect(path: Path, hf_config: Any, engine: str) -> RunState:
    """Read run.json and check, without a process group, that the checkpoint is complete and of this model and engine.

    Raises:
        DamagedCheckpoint: no checkpoint there, files missing or cut short, or an unknown format.
        ValueError: another model's, or another engine's.
    """
    state = read_state(path)
    check_files(path)
    ours = config_of(hf_config)
    differing = [
        f"{k} {state.model.get(k)} there, {ours.get(k)} here" for k in _SHAPE if state.model.get(k) != ours.get(k)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint {path} is of another model: {'; '.join(differing)}. Set the model section as in the run "
            "that wrote it (its config.yaml), or choose another checkpoint."
        )
    if state.engine != engine:
        raise ValueError(
            f"the checkpoint {path} was written by parallel.engine: {state.engine}, and {engine} cannot read its "
            "optimizer. Go on with that engine, or take its weights alone: export the run (checkpoint.export: true, or "
            "launch/export.py) and give the folder as model.path."
        )
    return state


def check_files(path: Path) -> None:
    """Raise a `DamagedCheckpoint` unless every file is as long as it was written, and DCP's metadata can be read."""
    content = _read(path)
    for name, size in content["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise DamagedCheckpoint(
                f"the checkpoint {path} is damaged: {name} should have {size} bytes and is {found}."
            )
    try:
        dcp.FileSystemReader(path).read_metadata()
    except (OSError, ValueError, EOFError, UnpicklingError) as error:
        raise DamagedCheckpoint(f"cannot read the checkpoint {path}: {error}.") from error


def _read(path: Path) -> dict[str, Any]:
    """run.json, of this format and with all it has to have."""
    try:
        content: dict[str, Any] = json.loads((path / "run.json").read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"it has format {content.get('format')}, and this version reads format {FORMAT}")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(
            f"{path} is not a complete checkpoint: run.json is missing. Give a folder named step_... as written under "
            "<run>/checkpoints."
        ) from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"cannot read the checkpoint {path}: {error}.") from error
    missing = {"files", *RunState.__dataclass_fields__} - content.keys()
    if missing:
        raise DamagedCheckpoint(f"cannot read the checkpoint {path}: run.json lacks {sorted(missing)}.")
    return content


def load(path: Path, engine: Engine, state: RunState) -> None:
    """Load tensors in place, and each rank's random state if as many ranks wrote it. Called by every rank.

    Raises:
        ValueError: the checkpoint lacks a tensor of this model or optimizer.
    """
    wanted = engine.state_dict()
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    missing = [name for name in _flat_names(wanted) if name not in known]
    if missing:
        raise ValueError(f"the checkpoint {path} lacks {len(missing)} entries, among them {missing[:3]}.")
    random = random_state() if state.ranks == dist.get_world_size() else {}
    try:
        dcp.load(wanted | random, checkpoint_id=path)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(f"rank {rank} cannot load the checkpoint {path}: {type(cause).__name__}: {cause}") from error
    engine.load_state_dict(wanted)
    engine.load(path)
    for name, value in random.items():
        if name.endswith("cuda"):
            torch.cuda.set_rng_state(value)
        else:
            torch.set_rng_state(value)


def random_state() -> dict[str, Any]:
    """This rank's generators, under names of its own."""
    name = f"random_{dist.get_rank()}"
    states = {f"{name}_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{name}_cuda"] = torch.cuda.get_rng_state()
    return states


def _flat_names(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The names DCP gives to the tensors of a nested state dict."""
    names: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            names += _flat_names(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            names.append(name)
    return names
