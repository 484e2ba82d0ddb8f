"""What a run tells while it trains: metrics.jsonl, a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. Sums and means are over all ranks and micro-batches of the step."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's labels, in nats."""
    tokens_per_second: float
    """Of all ranks together, over the whole step, data included."""
    visible_fraction: float
    """Share of the score matrix that the masks leave visible."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Of this step."""
    imbalance: float
    """Largest over mean area of the context ranks; 1 is even. Mean over the micro-batches."""
    received_fraction: float
    """Keys and values received, over what gathering all of them would receive. Mean over the micro-batches."""
    labels: int
    """Tokens that had something to predict; pairs of answers for tasks that compare them."""
    seconds: float
    """Of the step."""
    peak_memory_gib: float | None
    """Most memory that tensors took on rank 0's device since the start. None on a CPU."""
    task: Mapping[str, float] = field(default_factory=dict)
    """Figures of the task, such as dpo_accuracy: means over the step's pairs. Fields of their own in metrics.jsonl."""

    def line(self, steps: int) -> str:
        """For a reader."""
        memory = "" if self.peak_memory_gib is None else f"  peak {self.peak_memory_gib:.1f} GiB"
        return f"step {self.step}/{steps}  {self.summary()}  lr {self.lr:.2e}{memory}"

    def summary(self) -> str:
        """The three figures of the progress bar."""
        return f"loss {self.loss:.3f}  {self.tokens_per_second:,.0f} tokens/s  {self.visible_fraction:.1%} visible"


class Reporter:
    """Writes metrics.jsonl and shows progress; on other ranks than 0 it does nothing.

    Lines of steps after `start` (of a run that was cut off and is resumed before them) are removed from metrics.jsonl.
    """

    def __init__(self, folder: Path, *, start: int, steps: int, log_every: int, rank: int) -> None:
        self.steps, self.log_every, self.active = steps, log_every, rank == 0
        self.bar: Progress | None = None
        if not self.active:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _is_kept(line, start)] if path.exists() else []
        self.file = path.open("w")
        self.file.writelines(f"{line}\n" for line in kept)
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
            self.bar = Progress("[bold]training", *columns)
            self.task = self.bar.add_task("train", total=steps, completed=start, figures="")

    def __enter__(self) -> Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.active:
            self.file.close()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        elif self.active:
            print(text, flush=True)

    def step(self, metrics: StepMetrics) -> None:
        if not self.active:
            return
        values = asdict(metrics)
        values |= values.pop("task")
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.bar is not None:
            self.bar.update(self.task, completed=metrics.step, figures=metrics.summary())
        elif metrics.step % self.log_every == 0 or metrics.step in (1, self.steps):
            print(metrics.line(self.steps), flush=True)


def _is_kept(line: str, start: int) -> bool:
    """A kill can leave half a line."""
    try:
        return bool(json.loads(line)["step"] <= start)
    except (ValueError, KeyError):
        return False
