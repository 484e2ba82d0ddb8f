"""What every result file says about where it was made."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton


def environment(commit: str | None = None) -> dict[str, str]:
    """Date, hardware, versions, commit (asked of git if not given) and command of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _commit() -> str:
    """The checked-out commit, with a + when tracked files differ from it."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
