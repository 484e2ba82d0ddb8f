"""Processes that compile together and then measure one at a time, on a GPU that is otherwise idle.

What a process compiled for a cell's shape it keeps, and measures that cell itself: nothing is loaded or traced again.
One that dies, breaks its CUDA context or gives no answer is a row of the competitor it ran, and is replaced.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks import costs
from benchmarks.cells import Cell
from benchmarks.peers import Settings, competitors
from benchmarks.race import FAILED, ContextLost, describe, race
from benchmarks.records import Row
from benchmarks.timing import Timer
from benchmarks.warm import Job, compile_job, configure_compiler

# Memory only: an N x N mask at four heads is worth a look beyond the lengths at which it is timed.
DENSE_MEMORY_LIMIT = 32768


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The arguments of `Timer`."""

    budget_ms: float
    least: int
    long_ms: float


def measure(
    cell: Cell,
    names: Sequence[str],
    settings: Settings,
    device: str,
    timer: Timer,
    announce: Callable[[str], None] = lambda name: None,
) -> Iterator[Row]:
    """The rows of a cell, as its section measures it. `announce` hears whose turn it is, where they take turns."""
    if cell.section == "memory":
        settings = dataclasses.replace(settings, dense_limit=max(settings.dense_limit, DENSE_MEMORY_LIMIT))
        return costs.memory(cell, competitors(names, settings), device)
    if cell.section == "schedule":
        return costs.schedule(cell, names, device, timer)
    return race(cell, competitors(names, settings), device, timer, announce)


@dataclass
class _Member:
    process: Any
    connection: Connection


class Crew:
    """Args:
    size: processes.
    deadline: `time.monotonic()` at which whatever runs is stopped.
    patience: seconds in which a process must give an answer.
    """

    def __init__(
        self, size: int, settings: Settings, device: str, timing: Timing, *, deadline: float, patience: float
    ) -> None:
        if size < 1:
            raise ValueError(f"a crew has one process or more, got {size}.")
        if size > 1:
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are the parallelism
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (settings, device, timing)
        self._deadline, self._patience = deadline, patience
        self._members = [self._start() for _ in range(size)]
        self._keeper: dict[tuple[object, ...], _Member] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        for member in self._members:
            member.process.kill()
        for member in self._members:
            member.process.join()

    def compile(self, jobs: Sequence[Job]) -> None:
        """Do the jobs in all processes; what fails is printed, and met again when it is measured."""
        waiting, idle = deque(jobs), list(self._members)
        busy: dict[Connection, tuple[_Member, Job, float]] = {}
        while waiting or busy:
            while waiting and idle:
                job = waiting.popleft()
                member = self._ask(idle.pop(0), job)
                busy[member.connection] = (member, job, time.monotonic())
                if job.keeps:
                    self._keeper.update((cell.compilation, member) for cell in job.cells)
            answers = wait(list(busy), self._left(min(since for _, _, since in busy.values())))
            if time.monotonic() >= self._deadline:
                return
            late = [x for x, (_, _, since) in busy.items() if not answers and self._left(since) == 0]
            for connection in [*answers, *late]:
                member, job, _ = busy.pop(connection)  # type: ignore[index]
                what = f"compiling {', '.join(job.names)} for {job.cells[0].key}"
                trouble = self._no_answer()
                try:
                    if connection in answers:
                        kind, content = connection.recv()  # type: ignore[union-attr]
                        for trouble in content if kind == "done" else [content]:
                            print(f"compiling {trouble}", flush=True)
                        idle.append(member)
                        continue
                except EOFError:
                    trouble = None
                idle.append(self._replace(member))
                print(f"{what}: {trouble or _exit_code(member)}", flush=True)

    def measure(self, cell: Cell, names: Sequence[str]) -> Iterator[Row]:
        """The rows of a cell as they come; fewer if the deadline passes meanwhile."""
        left = list(names)
        while left and time.monotonic() < self._deadline:
            member = self._ask(self._keeper.get(cell.compilation, self._members[0]), (cell, tuple(left)))
            running = left[0]
            trouble = None
            while trouble is None:
                if not member.connection.poll(self._left(time.monotonic())):
                    if time.monotonic() >= self._deadline:
                        return
                    self._replace(member)
                    trouble = self._no_answer()
                    break
                try:
                    kind, content = member.connection.recv()
                except EOFError:
                    self._replace(member)
                    trouble = _exit_code(member)
                    break
                if kind == "done":
                    return
                if kind == "lost":
                    print(f"the CUDA context is lost, and its process with it: {content}", flush=True)
                    self._replace(member)
                    break
                if kind == "error":
                    trouble = content
                    break
                if kind == "running":
                    running = content
                    continue
                yield content
                left.remove(content["competitor"])
            if trouble is not None:
                failed = running if running in left else left[0]
                left.remove(failed)
                yield {"competitor": failed, "status": FAILED, "note": trouble}

    def _ask(self, member: _Member, task: object) -> _Member:
        """The process that was given the task: another one if this has died since its last."""
        try:
            member.connection.send(task)
        except OSError:
            member = self._replace(member)
            member.connection.send(task)
        return member

    def _left(self, since: float) -> float:
        """Seconds until an answer to what was asked `since` must have come."""
        return max(0.0, min(self._deadline, since + self._patience) - time.monotonic())

    def _no_answer(self) -> str:
        return f"no answer in {self._patience:g} s (--patience)"

    def _start(self) -> _Member:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        return _Member(process, ours)

    def _replace(self, member: _Member) -> _Member:
        member.process.kill()
        member.process.join()
        new = self._start()
        self._members[self._members.index(member)] = new
        self._keeper = {key: keeper for key, keeper in self._keeper.items() if keeper is not member}
        return new


def _exit_code(member: _Member) -> str:
    return f"its process ended with exit code {member.process.exitcode}"


def _work(connection: Connection, settings: Settings, device: str, timing: Timing) -> None:
    """Answers jobs and cells until the other end is gone."""
    configure_compiler()
    torch.set_num_threads(1)
    timer: Timer | None = None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(task, Job):
                connection.send(("done", compile_job(task, settings, device)))
                continue
            timer = timer or Timer(device, **dataclasses.asdict(timing))
            for row in measure(*task, settings, device, timer, lambda name: connection.send(("running", name))):
                connection.send(("row", row))
            # The other processes need the memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            connection.send(("done", None))
        except ContextLost as lost:
            connection.send(("lost", str(lost)))
            return
        except Exception as error:  # in what is made for all competitors of a cell
            connection.send(("error", describe(error)))
