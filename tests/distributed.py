"""One pool of gloo processes for the whole test session.

    from tests.distributed import run_ranks

    def sum_over_ranks(x):                       # module level: it travels by name
        t = torch.tensor(x + dist.get_rank())
        dist.all_reduce(t)
        return int(t)

    def test_sum():
        assert run_ranks(3, sum_over_ranks, 10) == [33, 33, 33]

Processes start at first use, stay for the session (a call costs milliseconds, not a start) and end with it. They are
forks of one process that has imported what all of them need, so that starting one costs little. Every call gets a
process group of its own: inside `fn` the default group is gloo with exactly `world_size` ranks, so device meshes and
sub-groups start from nothing, and RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set as torchrun sets them.
Arguments and results travel by pickle: keep tensors on the CPU and detached. torch has one thread and seed 0.

Each pytest process has a pool and a store of its own, at a port that the system gives, so several do not meet.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Imported before the ranks are forked, in place of some 5 seconds of work in each of them. Nothing that starts a thread
# or asks for a GPU when imported: a fork cannot use either. Test modules may, and each rank imports those itself.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.checkpoint", "transformers.modeling_utils", "triton"]
# When one rank has failed the others usually wait for it in a collective; they get this long to finish by themselves.
GRACE_SECONDS = 5.0


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds what each of them said."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
    """Call `fn(*args, **kwargs)` on ranks 0..world_size-1; return their results in rank order.

    Args:
        fn: a module-level function of an importable module.
        timeout: seconds for the call and for each collective in it. Ranks that are not done by then are killed and
            replaced at the next call.

    Raises:
        RankError: with the traceback of each failed rank.
    """
    return _pool.run(world_size, fn, args, kwargs, timeout)


def close() -> None:
    """End the processes; a later call starts new ones."""
    _pool.close()


class _Pool:
    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []
        self.store: Any = None
        self.calls = 0

    def run(self, world_size: int, fn: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        self._grow(world_size)
        self.calls += 1
        task = pickle.dumps((world_size, self.store.port, self.calls, timeout, fn, args, kwargs))
        replies: dict[int, tuple[bool, Any]] = {}
        waiting = {}
        for rank in range(world_size):
            connection = self.workers[rank][1]
            connection.send_bytes(task)
            waiting[connection] = rank

        deadline = time.monotonic() + timeout + GRACE_SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    replies[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    replies[rank] = (False, "the process died")
                if not replies[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            replies[rank] = (False, "no answer in time; its stack is in the captured stderr if the timeout ran out")

        failed = {rank: text for rank, (ok, text) in sorted(replies.items()) if not ok}
        if failed:
            # Their connections to each other may be broken: only fresh processes are surely clean.
            self.close()
            raise RankError("".join(f"\n--- rank {rank} of {world_size} ---\n{text}" for rank, text in failed.items()))
        return [replies[rank][1] for rank in range(world_size)]

    def _grow(self, world_size: int) -> None:
        if self.store is None:
            import torch.distributed as dist

            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        while len(self.workers) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(len(self.workers), theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def close(self) -> None:
        for process, connection in self.workers:
            connection.close()
            # And what it started: Megatron writes checkpoints from processes that would outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers = []


_pool = _Pool()


def _work(rank: int, connection: Connection) -> None:
    """A worker's life: tasks in, (succeeded, result or traceback) out, until the pool closes the pipe."""
    os.setpgrp()
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    from tests import interpreter

    torch.set_num_threads(1)
    if "TRITON_INTERPRET" in os.environ:
        interpreter.make_quick()
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            reply = pickle.dumps((True, _call(rank, task)))
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(reply)


def _call(rank: int, task: bytes) -> Any:
    import torch
    import torch.distributed as dist

    world_size, port, call, timeout, fn, args, kwargs = pickle.loads(task)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    limit = datetime.timedelta(seconds=timeout)
    client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    store = dist.PrefixStore(f"call{call}", client)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    faulthandler.dump_traceback_later(timeout, file=sys.__stderr__)
    try:
        torch.manual_seed(0)
        return fn(*args, **kwargs)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
