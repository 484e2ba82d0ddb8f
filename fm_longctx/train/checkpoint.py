"""Checkpoints: sharded model and optimizer, random state, data position; written whole or not at all.

    <run>/checkpoints/step_00000020/     DCP files (.metadata, *.distcp) and run.json
    <run>/checkpoints/latest             the name of the newest complete one

A checkpoint is written beside its place under a name ending in .partial, moved there when every rank is done, and only
then named in `latest`: a kill at any moment leaves the previous one in force. Another number of ranks can load it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from fm_longctx.train.engines import Engine

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint says besides tensors; run.json."""

    step: int
    """Steps done."""
    data: dict[str, Any]
    """The loader's state, the same on every rank."""
    model: dict[str, Any]
    """The shape of the model, in the names of its Hugging Face config."""
    ranks: int
    """How many ranks wrote it."""


def shape_of(hf_config: Any) -> dict[str, Any]:
    """What has to agree between a checkpoint and the model that loads it."""
    names = (
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
    shape = {name: getattr(hf_config, name, None) for name in names}
    return dict(json.loads(json.dumps(shape)))


def save(folder: Path, engine: Engine, state: RunState, *, keep: int) -> Path:
    """Write `folder/step_...`, point `latest` at it and delete all but the newest `keep`. Called by every rank."""
    place = folder / f"step_{state.step:08d}"
    partial = place.with_suffix(".partial")
    if dist.get_rank() == 0:
        for stale in (partial, place):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(engine.state_dict() | _random_state(), checkpoint_id=partial)
    engine.save(partial)
    if dist.get_rank() == 0:
        content = {"format": FORMAT, **vars(state)}
        (partial / "run.json").write_text(json.dumps(content, indent=1))
        partial.rename(place)
        pointer = folder / "latest.partial"
        pointer.write_text(place.name)
        os.replace(pointer, folder / "latest")
        for old in sorted(p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".partial")[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return place


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under a run's checkpoints folder, if there is any."""
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.is_file() else None


def inspect(path: Path, hf_config: Any) -> RunState:
    """Read run.json and check, without a process group, that the checkpoint is complete and of this model.

    Raises:
        ValueError: no checkpoint there, files missing or cut short, an unknown format, or another model's.
    """
    try:
        content = json.loads((path / "run.json").read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"it has format {content.get('format')}, and this version reads format {FORMAT}")
        metadata = dcp.FileSystemReader(path).read_metadata()
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not a complete checkpoint: {Path(error.filename or '').name} is missing. Give a folder named "
            "step_... as written under <run>/checkpoints."
        ) from error
    except (OSError, ValueError, EOFError, UnpicklingError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}.") from error
    state = RunState(**{name: content[name] for name in ("step", "data", "model", "ranks")})
    ours = shape_of(hf_config)
    differing = [f"{k} {state.model.get(k)} there, {v} here" for k, v in ours.items() if state.model.get(k) != v]
    if differing:
        raise ValueError(
            f"the checkpoint {path} is of another model: {'; '.join(differing)}. Set the model section as in the run "
            "that wrote it (its config.yaml), or choose another checkpoint."
        )
    needed: dict[str, int] = {}
    for item in (metadata.storage_data or {}).values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    for name, size in needed.items():
        file = path / name
        if not file.is_file() or file.stat().st_size < size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise ValueError(f"the checkpoint {path} is damaged: {name} should have {size} bytes and is {found}.")
    return state


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
    random = _random_state() if state.ranks == dist.get_world_size() else {}
    dcp.load(wanted | random, checkpoint_id=path)
    engine.load_state_dict(wanted)
    engine.load(path)
    for name, value in random.items():
        if name.endswith("cuda"):
            torch.cuda.set_rng_state(value)
        else:
            torch.set_rng_state(value)


def _random_state() -> dict[str, Any]:
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
