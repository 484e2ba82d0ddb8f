"""The pool of test processes: results, failures, hangs, and that it survives them."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks


def sum_over_ranks(x):
    total = torch.tensor(x + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_world_size(), int(total), os.environ["RANK"]


def fail_on(rank):
    if dist.get_rank() == rank:
        raise RuntimeError(f"rank {rank} says no")
    dist.barrier()


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)


def die():
    os._exit(3)


def process_id():
    return os.getpid()


def start_a_process():
    return subprocess.Popen(["sleep", "300"]).pid


def runs(pid):
    """Whether the process is there, and not only waited for by nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def sum_in_mesh():
    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "cp"))
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total, group=mesh.get_group("cp"))
    return int(total)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_in_rank_order(world_size):
    total = sum(range(10, 10 + world_size))
    assert run_ranks(world_size, sum_over_ranks, 10) == [(world_size, total, str(r)) for r in range(world_size)]


def test_processes_are_kept_between_calls_and_groups_are_not():
    first = run_ranks(2, process_id)
    assert run_ranks(4, sum_in_mesh) == [1, 1, 5, 5]
    assert run_ranks(2, sum_in_mesh) == [0, 1]
    assert run_ranks(2, process_id) == first


@pytest.mark.parametrize(
    "fn, args, words", [(fail_on, (1,), "rank 1 says no"), (die, (), "died"), (hang_on, (0,), "in time")]
)
def test_a_bad_rank_is_reported_and_the_pool_recovers(fn, args, words, monkeypatch):
    monkeypatch.setattr("tests.distributed.GRACE_SECONDS", 0.5)
    started = run_ranks(2, start_a_process)
    assert all(runs(pid) for pid in started)
    with pytest.raises(RankError, match=words):
        run_ranks(2, fn, *args, timeout=2.0 if fn is hang_on else 20.0)
    assert run_ranks(2, sum_over_ranks, 0)[1] == (2, 1, "1")
    deadline = time.monotonic() + 10
    while any(runs(pid) for pid in started):
        assert time.monotonic() < deadline, "what the ranks had started outlives them"
        time.sleep(0.05)
