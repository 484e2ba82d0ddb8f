"""What a run was: its config, the machine and libraries it ran on, and the state of the code. Written at each start."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fm_longctx.train.config import Config
from fm_longctx.train.config_load import to_yaml

_LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "safetensors",
    "peft",
    "deepspeed",
    "megatron-core",
    "datasets",
)
_PREFIXES = (
    "CUBLAS_",
    "CUDA_",
    "FI_",
    "FM_LONGCTX_",
    "GLOO_",
    "MASTER_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "SLURM_JOB_",
    "SLURM_NNODES",
    "TORCH",
    "TRITON_",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL")


def write(folder: Path, config: Config, *, step: int) -> Path:
    """Write `starts/step_.../` of a run folder: config.yaml, environment.json, git.json and, of changed code, git.diff.

    Each start has a folder of its own, so that a run resumed on other code or other machines says so.
    """
    place = folder / "starts" / f"step_{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(to_yaml(config))
    (place / "environment.json").write_text(json.dumps(environment(), indent=1))
    state, diff = git_state(Path(__file__).parents[2])
    (place / "git.json").write_text(json.dumps(state, indent=1))
    (place / "git.diff").unlink(missing_ok=True)
    if diff:
        (place / "git.diff").write_text(diff)
    return place


def environment() -> dict[str, Any]:
    """Versions, hardware and the variables that change what a run does; nothing that looks like a secret."""
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpus = []
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = [{"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1)} for p in properties]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "libraries": versions,
        "cuda": torch.version.cuda,
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "torch_config": torch.__config__.show(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and not any(word in name for word in _SECRETS)
        },
    }


def git_state(folder: Path) -> tuple[dict[str, Any], str]:
    """Commit, branch and changed files of the checkout that holds the code, and its diff; why not, if it is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    try:
        changed = git("status", "--porcelain").splitlines()
        state = {"commit": git("rev-parse", "HEAD").strip(), "branch": git("branch", "--show-current").strip()}
        return state | {"changed": changed}, git("diff", "HEAD")
    except FileNotFoundError:
        return {"commit": None, "reason": "git is not installed"}, ""
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        return {"commit": None, "reason": said.strip()}, ""
