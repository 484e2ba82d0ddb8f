"""What torchrun says about this process, before any process group exists."""

from __future__ import annotations

import os


def ranks_started() -> int:
    """How many ranks torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_rank() -> int:
    """This process's rank by torchrun's word, before any process group; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
