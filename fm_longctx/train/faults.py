"""What a run does when something goes wrong: bad steps, and being told to stop."""

from __future__ import annotations

import signal
import statistics
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar

import torch

from fm_longctx.data import Batch
from fm_longctx.train.step import not_finite

# Steps whose loss and gradient norm the median is taken over, and how many there must be before it is trusted.
_MEMORY = 100
_ENOUGH = 10
# Skipped steps count against train.max_skipped for so many steps.
_WINDOW = 100


class Watch:
    """Judges each step before the optimizer moves, from what is the same on every rank.

    Args:
        spike_factor: a loss or a gradient norm above this many times its median over the last 100 steps taken is a
            spike, once there are 10 of them. None: only what is not finite is bad.
        max_skipped: how many steps may be skipped within the last 100.
    """

    def __init__(self, *, spike_factor: float | None, max_skipped: int) -> None:
        self.spike_factor, self.max_skipped = spike_factor, max_skipped
        self.total = 0
        """Steps skipped since the run began."""
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._norms: deque[float] = deque(maxlen=_MEMORY)
        self._skipped: list[int] = []

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must not be taken; None if it may. Changes nothing."""
        if (bad := not_finite(loss, grad_norm)) is not None:
            return bad
        for name, value, past in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            if self.spike_factor is not None and len(past) >= _ENOUGH:
                median = statistics.median(past)
                if value > self.spike_factor * median:
                    return f"the {name} is {value:.4g}, above {self.spike_factor:g} x its median {median:.4g}"
        return None

    def note(self, step: int, loss: float, grad_norm: float, fault: str | None) -> bool:
        """Remember a step; whether too many have been skipped."""
        if fault is None:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            return False
        self.total += 1
        self._skipped = [s for s in self._skipped if s > step - _WINDOW] + [step]
        return len(self._skipped) > self.max_skipped

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run judges as one that never stopped."""
        return {
            "total": self.total,
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skipped": list(self._skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.total = state["total"]
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._skipped = list(state["skipped"])


def save_batches(folder: Path, step: int, rank: int, batches: Sequence[Batch], fault: str) -> Path:
    """Write what this rank fed to a bad step: `torch.load` of the file gives a dict.

    Its "micro_batches" hold each one's "sequences" (indexes in the stream), "rows" (this rank's positions in the whole
    sequence, int64 `[T]`), "tokens", "labels" and "positions" (int64 `[B, T]`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}_rank_{rank}.pt"
    content = [
        {
            "sequences": list(batch.sequences),
            "rows": batch.local.rows,
            "tokens": batch.tokens,
            "labels": batch.labels,
            "positions": batch.positions,
        }
        for batch in batches
    ]
    torch.save({"step": step, "fault": fault, "micro_batches": content}, path)
    return path


class StopSignal:
    """While it is open, SIGTERM asks the loop to stop after the step under way instead of ending the process."""

    seen: ClassVar[bool] = False
    """Whether this process has ever got one: then whoever sent it knows why, and a failure that follows is no news."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = StopSignal.seen = True
