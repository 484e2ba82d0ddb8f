"""Writing checkpoints beside the training: one at a time, whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from fm_longctx.train.checkpoint import FORMAT, RunState, complete, random_state
from fm_longctx.train.engines import Engine


@dataclass(kw_only=True)
class _Writing:
    """A save under way."""

    step: int
    place: Path
    began: float
    done: Future[Any]
    told: bool = False


class _NotWritten(Exception):
    """A save that ended before DCP began; the message says why."""


class CheckpointWriter:
    """Saves a run's checkpoints under one folder. Made, and called, by every rank alike.

    The tensors are copied to the CPU's memory while training waits, and written from there by a thread, unless
    `asynchronous` is False. They go into a folder ending in .partial, which rank 0 moves to its final name when every
    rank is done, and then all but the newest `keep` are deleted. A save waits for the one before. One that fails, on
    whatever rank, leaves the older ones alone; training goes on, and `wait` tells.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool = True) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        # A group of its own: a thread's collectives must not mix with those of the training.
        self.group = dist.new_group(backend="gloo")
        self._writing: _Writing | None = None
        self._said: list[str] = []
        self.failed: str | None = None
        """Why the last save that ended wrote nothing; None if it did."""

    def save(self, engine: Engine, state: RunState) -> None:
        """Begin to write `folder/step_...`; when that is done, `news` says so."""
        self.wait()
        began = time.perf_counter()
        place = self.folder / f"step_{state.step:08d}"
        partial = place.with_suffix(".partial")
        problem = None
        if dist.get_rank() == 0:
            try:
                for stale in (*self.folder.glob("*.partial"), *self.folder.glob(place.name)):
                    shutil.rmtree(stale)
                partial.mkdir(parents=True)
            except OSError as error:
                problem = _words(error)
        # Chained to DCP's, so that whoever waits for it waits for the final name too.
        done: Future[Any] = Future()
        self._writing = _Writing(step=state.step, place=place, began=began, done=done)
        problem = self._of_rank_0(problem)
        if problem is None:
            problem = self._of_any_rank(partial, engine)
        if problem is not None:
            done.set_exception(self._given_up(place, _NotWritten(problem)))
            self.wait()
            return
        content = engine.state_dict() | random_state()
        writer = dcp.FileSystemWriter(partial)
        future: Future[Any]
        if self.asynchronous:
            future = cast("Future[Any]", dcp.async_save(content, storage_writer=writer, process_group=self.group))
        else:
            future = Future()
            try:
                future.set_result(dcp.save(content, storage_writer=writer, process_group=self.group))
            except CheckpointException as error:
                future.set_exception(error)
        future.add_done_callback(lambda finished: self._finish(finished, state, place, done))
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the save under way, if any, has ended on every rank; then `failed` is the same on all of them."""
        if self._writing is None:
            return
        error = self._writing.done.exception()
        self.failed = self._of_rank_0(None if error is None else _words(error))
        self._tell(self._writing, self.failed)
        self._writing = None

    def news(self) -> list[str]:
        """What has ended since the last call, for a reader. Waits for no rank: rank 0 knows all."""
        if self._writing is not None and self._writing.done.done():
            error = self._writing.done.exception()
            self._tell(self._writing, None if error is None else _words(error))
        said, self._said = self._said, []
        return said

    def _tell(self, writing: _Writing, problem: str | None) -> None:
        if writing.told:
            return
        writing.told = True
        if problem is None:
            seconds = time.perf_counter() - writing.began
            self._said.append(f"step {writing.step}: checkpoint {writing.place} ({seconds:.1f} s)")
        else:
            previous = next(iter(complete(self.folder)), None)
            left = "there is no older one" if previous is None else f"{previous.name} stays in force"
            self._said.append(f"step {writing.step}: the checkpoint could not be written ({problem}); {left}.")

    def _finish(self, finished: Future[Any], state: RunState, place: Path, done: Future[Any]) -> None:
        """On the thread that wrote: DCP reports success to rank 0 only when every rank's files are on the disk."""
        try:
            finished.result()
            if dist.get_rank() == 0:
                partial = place.with_suffix(".partial")
                files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
                content = {"format": FORMAT, "files": files, **vars(state)}
                (partial / "run.json").write_text(json.dumps(content, indent=1))
                partial.rename(place)
                for old in complete(self.folder)[self.keep :]:
                    shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:  # DCP's own is no Exception; whatever it is, `wait` reports it.
            done.set_exception(self._given_up(place, error))
        else:
            done.set_result(None)

    def _given_up(self, place: Path, error: BaseException) -> BaseException:
        """On rank 0, when every rank has stopped writing, take away what is half there: a full disk needs the room."""
        if dist.get_rank() != 0:
            return error
        words, free = _words(error), shutil.disk_usage(self.folder).free
        shutil.rmtree(place.with_suffix(".partial"), ignore_errors=True)
        # torch's own writer does not say why it could not write.
        return _NotWritten(f"{words}; {free / 2**20:.1f} MiB were free there" if free < 64 << 20 else words)

    def _of_any_rank(self, partial: Path, engine: Engine) -> str | None:
        """Have the engine write its own files, if it has any; the first rank's problem with that, on every rank."""
        problem = None
        try:
            engine.save(partial)
        except OSError as error:
            problem = f"rank {dist.get_rank()}: {_words(error)}"
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, problem, group=self.group)
        return next((word for word in told if word is not None), None)

    def _of_rank_0(self, problem: str | None) -> str | None:
        """Rank 0's problem, on every rank."""
        told = [problem]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]


def _words(error: BaseException) -> str:
    """An error in a line: of DCP's, which carry a stack of each rank, the first rank's."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return str(error) if isinstance(error, _NotWritten) else f"{type(error).__name__}: {error}"
