"""What a run tells while it trains: metrics.jsonl, a progress bar or plain lines, and what trackers are told."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fm_longctx.train.json_lines import JsonLines
from fm_longctx.train.trackers import Tracker


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. Sums and means are over all ranks and micro-batches of the step."""

    step: int
    """Steps done, this one included."""
    loss: float | None
    """Mean over the step's labels, in nats. None if it is not finite."""
    tokens_per_second: float
    """Of all ranks together, over the whole step, data included."""
    tokens_per_second_per_gpu: float
    """The same, over the number of ranks."""
    tflops_per_gpu: float
    """Forward and backward by the masks' visible area (`flops.FlopCount`), without recomputation; TFLOP/s a rank."""
    mfu: float | None
    """tflops_per_gpu over the GPU's peak. None where the peak is not known."""
    visible_fraction: float
    """Share of the score matrix that the masks leave visible."""
    grad_norm: float | None
    """Before clipping. None if it is not finite."""
    lr: float
    """Of this step."""
    imbalance: float
    """Largest over mean area of the context ranks; 1 is even. Mean over the micro-batches."""
    received_fraction: float
    """Keys and values received, over what gathering all of them would receive. Mean over the micro-batches."""
    exchange_seconds: float | None
    """Time that attention stood still for keys and gradients of other ranks, in the mean over ranks. None without
    context parallelism."""
    labels: int
    """Tokens that had something to predict; pairs of answers for tasks that compare them."""
    skipped: int
    """Steps skipped since the run began, this one included."""
    fault: str | None
    """Why this step was skipped; None if it was taken."""
    seconds: float
    """Of the step."""
    peak_memory_gib: float | None
    """Most memory that tensors took on rank 0's device since the start. None on a CPU."""
    task: Mapping[str, float] = field(default_factory=dict)
    """Figures of the task, such as dpo_accuracy: means over the step's pairs. Fields of their own in metrics.jsonl."""

    def line(self, steps: int) -> str:
        """For a reader."""
        memory = "" if self.peak_memory_gib is None else f"  peak {self.peak_memory_gib:.1f} GiB"
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        return f"step {self.step}/{steps}  {self.summary()}  lr {self.lr:.2e}{mfu}{memory}"

    def summary(self) -> str:
        """The three figures of the progress bar."""
        loss = "not finite" if self.loss is None else f"{self.loss:.3f}"
        return f"loss {loss}  {self.tokens_per_second:,.0f} tokens/s  {self.visible_fraction:.1%} visible"


class Reporter:
    """Writes metrics.jsonl and shows progress; on other ranks than 0 it does nothing.

    Lines of steps after `start` (of a run that was cut off and is resumed before them) are removed from metrics.jsonl
    and eval.jsonl. Trackers get the same figures.
    """

    def __init__(
        self, folder: Path, *, start: int, steps: int, log_every: int, rank: int, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.steps, self.log_every, self.active = steps, log_every, rank == 0
        self.trackers = tuple(trackers)
        self.bar: Progress | None = None
        if not self.active:
            return
        self.file = JsonLines(folder / "metrics.jsonl", start=start)
        there = (folder / "eval.jsonl").exists()
        self.evaluations = JsonLines(folder / "eval.jsonl", start=start) if there else None
        self.folder = folder
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
            for lines in (self.file, self.evaluations):
                lost = 0 if lines is None else lines.close()
                if lines is not None and lost:
                    print(f"no room on the disk: the last {lost} lines of {lines.path} are lost", flush=True)
            for tracker in self.trackers:
                tracker.close()

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
        self._add(self.file, values)
        for tracker in self.trackers:
            tracker.scalars(metrics.step, {k: v for k, v in values.items() if isinstance(v, (int, float))})
        if self.bar is not None:
            self.bar.update(self.task, completed=metrics.step, figures=metrics.summary())
        elif metrics.step % self.log_every == 0 or metrics.step in (1, self.steps):
            print(metrics.line(self.steps), flush=True)

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """A line of eval.jsonl; its loss and perplexity go to the trackers too."""
        if not self.active:
            return
        if self.evaluations is None:
            self.evaluations = JsonLines(self.folder / "eval.jsonl", start=0)
        self._add(self.evaluations, record)
        for tracker in self.trackers:
            tracker.scalars(step, {f"eval_{name}": record[name] for name in ("loss", "perplexity")})

    def _add(self, lines: JsonLines, record: Mapping[str, Any]) -> None:
        waited = bool(lines.waiting)
        if not lines.add(record) and not waited:
            self.say(f"no room on the disk: lines of {lines.path} wait until there is")
