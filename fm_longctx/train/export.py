"""A checkpoint as a Hugging Face folder: config.json, safetensors, and the tokenizer's files where they are known."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fm_longctx.train import checkpoint
from fm_longctx.train.engines import Engine
from fm_longctx.train.tasks.lora import is_exported

MAX_FILE_BYTES = 5 * 10**9
"""Weights go into one file up to this size, and into several with an index above it."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class HuggingFaceFolder:
    """Writes a model's weights, one after the other, and what else makes a folder that `from_pretrained` reads.

    Everything goes into `<out>.partial`, which `finish` moves to `out`: a folder of that name is whole.

    Args:
        out: does not exist yet, or is empty.
        dtype: of floating-point weights.
        max_file_bytes: weights go into one file up to this size, and into several with an index above it.

    Raises:
        ValueError: `out` holds something.
    """

    def __init__(self, out: Path, *, dtype: torch.dtype, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not an empty folder. Choose another for the export, or empty it.")
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self.dtype, self.max_file_bytes = dtype, max_file_bytes
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, weight: Tensor) -> None:
        """The next weight, whole, under its Hugging Face name."""
        kept = weight.detach().to("cpu", self.dtype if weight.is_floating_point() else weight.dtype).contiguous()
        if self._pending and sum(w.nbytes for w in self._pending.values()) + kept.nbytes > self.max_file_bytes:
            self._flush()
        self._pending[name] = kept
        self._total += kept.nbytes

    def finish(self, config: Mapping[str, Any], tokenizer: Path | None) -> list[Path]:
        """The rest: config.json, the tokenizer's files that `tokenizer` has, and the folder's name; its files."""
        self._flush()
        count = len(self._files)
        where: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.partial / f"part-{number}").rename(self.partial / file)
            where |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        content = dict(config) | {"dtype": str(self.dtype).removeprefix("torch.")}
        if not content.get("architectures"):
            # A model built from a config alone has not noted its class, which other programs ask for.
            content["architectures"] = [_class_of(content["model_type"])]
        (self.partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        for name in _TOKENIZER_FILES:
            if tokenizer is not None and (tokenizer / name).is_file():
                shutil.copy2(tokenizer / name, self.partial / name)
        if self.out.exists():
            self.out.rmdir()
        self.partial.rename(self.out)
        return sorted(self.out.iterdir())

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._pending:
            save_file(self._pending, str(self.partial / f"part-{len(self._files)}"), metadata={"format": "pt"})
            self._files.append(list(self._pending))
            self._pending = {}


def export(
    path: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[Path]:
    """Write a Hugging Face folder from a checkpoint, in one process, holding one file's weights at a time.

    Args:
        path: a checkpoint (step_...), or a run folder, whose newest complete one is taken.
        out: does not exist yet, or is empty.
        dtype: of floating-point weights.
        tokenizer: a folder whose tokenizer files are copied; the one that the run read if not given.
        max_file_bytes: size of a file of weights.

    Returns:
        the files written.

    Raises:
        ValueError: no complete checkpoint there, one without weights under Hugging Face's names, or `out` is not empty.
    """
    path = _checkpoint_of(path)
    state = checkpoint.read_state(path)
    checkpoint.check_files(path)
    weights = _weights(path, state)
    folder = HuggingFaceFolder(out, dtype=dtype, max_file_bytes=max_file_bytes)
    for name, weight in _stored(path, weights, max_file_bytes):
        folder.add(name, weight)
    return folder.finish(state.model, tokenizer or (Path(state.tokenizer) if state.tokenizer is not None else None))


def export_engine(engine: Engine, out: Path, *, dtype: torch.dtype, tokenizer: str | None) -> None:
    """Write a Hugging Face folder from a model in training, whatever its engine; an older one there is replaced.

    A collective: rank 0 writes what the others send, weight by weight.
    """
    folder = None
    if engine.world.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        folder = HuggingFaceFolder(out, dtype=dtype)
    for name, weight in engine.weights():
        if folder is not None:
            folder.add(name, weight)
    if folder is not None:
        folder.finish(checkpoint.config_of(engine.hf_config), None if tokenizer is None else Path(tokenizer))


def _class_of(model_type: str) -> str:
    """The name of transformers' causal language model of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _checkpoint_of(path: Path) -> Path:
    if (path / "checkpoints").is_dir():
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path / 'checkpoints'} holds no complete checkpoint.")
        return newest
    return path


def _weights(path: Path, state: checkpoint.RunState) -> dict[str, TensorStorageMetadata]:
    """Name to shape and dtype of the model's weights in a checkpoint; of tied ones the first."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        name.removeprefix("model."): entry
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    if not weights:
        raise ValueError(
            f"the checkpoint {path} of parallel.engine: {state.engine} holds no weights under Hugging Face's names. "
            "Let the run export its model itself, with checkpoint.export: true."
        )
    if any(is_exported(name) for name in weights):
        raise ValueError(
            f"the checkpoint {path} holds adapters or a score head, not a whole language model. Let the run export "
            "them itself, with checkpoint.export: true."
        )
    if state.model.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    return weights


def _stored(path: Path, weights: dict[str, TensorStorageMetadata], at_once: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, of which about `at_once` bytes are read together."""
    group: dict[str, Any] = {}
    size = 0
    names = list(weights)
    for name in names:
        entry = weights[name]
        group[f"model.{name}"] = torch.empty(entry.size, dtype=entry.properties.dtype)
        size += group[f"model.{name}"].nbytes
        if size >= at_once or name == names[-1]:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(group, checkpoint_id=path, no_dist=True)
            for full_name in list(group):
                yield full_name.removeprefix("model."), group.pop(full_name)
            size = 0


def main(arguments: list[str], *, usage: str | None) -> int:
    """The command line of launch/export.py; the exit code."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="step_... of a run, or the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet, or empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer files are copied")
    parser.add_argument("--max-file-bytes", type=int, default=MAX_FILE_BYTES, help="size of a file of weights")
    given = parser.parse_args(arguments)
    try:
        written = export(
            given.checkpoint,
            given.out,
            dtype=getattr(torch, given.dtype),
            tokenizer=given.tokenizer,
            max_file_bytes=given.max_file_bytes,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{path}  {path.stat().st_size:,} bytes" for path in written))
    return 0
