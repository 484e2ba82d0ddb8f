"""Looking inside on request: a trace of some steps, and a snapshot of the GPU's memory when it has run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

# Allocations that the history keeps.
_HISTORY = 200_000


class Profiler:
    """Traces the given steps of this process into one file in `profile/` of the run folder, for Perfetto.

    Args:
        steps: consecutive step numbers, counted from 1. Empty: nothing is traced.
    """

    def __init__(self, folder: Path, steps: range, *, rank: int) -> None:
        self.steps = steps
        self.path = folder / "profile" / f"steps_{steps[0]}-{steps[-1]}_rank_{rank}.json.gz" if steps else None
        self._trace: Any = None

    def before(self, step: int) -> None:
        """Call before each step."""
        if self.path is not None and self._trace is None and step in self.steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
            self._trace.start()

    def after(self, step: int, *, last: bool = False) -> Path | None:
        """Call after each step; where the trace is, once it is written."""
        if self._trace is None or self.path is None or (step < self.steps[-1] and not last):
            return None
        self._trace.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self.path))
        self._trace = None
        return self.path


@contextmanager
def memory_snapshot(folder: Path, *, rank: int, history: bool) -> Iterator[None]:
    """If the GPU runs out of memory inside, write `memory/rank_....pickle` (for pytorch.org/memory_viz) and say so.

    Args:
        history: note every allocation from here on, so that the snapshot says which code holds what.
    """
    if history and torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
    try:
        yield
    except torch.OutOfMemoryError as error:
        place = folder / "memory"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"rank_{rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        hint = "" if history else " train.memory_history: true adds who allocated what."
        raise OutOfMemory(
            f"{error} What the GPU held is in {path}; open it at pytorch.org/memory_viz.{hint}"
        ) from error
    finally:
        if history and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)


class OutOfMemory(RuntimeError):
    """The GPU ran out of memory; the message says where the snapshot is."""
