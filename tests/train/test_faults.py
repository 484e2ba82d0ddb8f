"""What goes wrong is done here: bad steps, a full disk, cut files, signals, a kill while writing, a killed rank."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from fm_longctx.train import checkpoint, metrics
from fm_longctx.train.engines.fsdp import FsdpEngine
from fm_longctx.train.faults import Watch
from fm_longctx.train.start import prepare
from fm_longctx.train.step import NextToken, TrainingError
from tests.distributed import run_ranks
from tests.train.runs import BASE, config_of, lines_of, train_here

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())


def test_what_counts_as_a_fault():
    watch = Watch(spike_factor=4.0, max_skipped=2)
    assert watch.fault(math.inf, 1.0) == "the loss is inf"
    assert watch.fault(1.0, math.nan) == "the gradient norm is nan"
    for step in range(1, 10):
        assert watch.fault(2.0, 100.0 * step) is None
        watch.note(step, 2.0, 1.0, None)
    # Nine steps are too few for a median.
    assert watch.fault(9.0, 1.0) is None
    watch.note(10, 2.0, 1.0, None)
    assert watch.fault(7.9, 3.9) is None
    assert watch.fault(8.1, 1.0) == "the loss is 8.1, above 4 x its median 2"
    assert watch.fault(2.0, 4.1) == "the gradient norm is 4.1, above 4 x its median 1"
    # A spike is not part of what comes after.
    assert not watch.note(11, 1e9, 1.0, "spike")
    assert watch.fault(8.1, 1.0) is not None
    resumed = Watch(spike_factor=4.0, max_skipped=2)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.fault(8.1, 1.0) == watch.fault(8.1, 1.0) and resumed.total == 1
    assert not resumed.note(12, 1e9, 1.0, "spike")
    assert resumed.note(13, 1e9, 1.0, "spike")
    # Those of more than a hundred steps ago are forgiven.
    assert not watch.note(112, 1e9, 1.0, "spike")
    assert Watch(spike_factor=None, max_skipped=0).fault(1e30, 1e30) is None


def train_with_bad_steps(folder, bad, **changes):
    """The loss of rank 1 is NaN in these steps, as its own batch could make it; what a skipped step moved."""
    plain, discard = NextToken.loss, FsdpEngine.discard
    calls, moved = [0], []

    def loss(task, model, batch, mask):
        calls[0] += 1
        total = plain(task, model, batch, mask)
        return total * math.nan if calls[0] in bad and os.environ["RANK"] == "1" else total

    def discarded(engine):
        before = {n: p.detach().to_local().clone() for n, p in engine.model.named_parameters()}
        discard(engine)
        moved.extend(n for n, p in engine.model.named_parameters() if not torch.equal(before[n], p.to_local()))
        moved.extend(n for n, p in engine.model.named_parameters() if p.grad is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NextToken, "loss", loss)
        patch.setattr(FsdpEngine, "discard", discarded)
        try:
            train_here(folder, **changes)
        except TrainingError as error:
            return moved, str(error)
    return moved, None


def test_a_bad_step_is_skipped_by_all_ranks_and_its_batch_kept(tmp_path):
    folder = tmp_path / "run"
    assert run_ranks(2, train_with_bad_steps, str(folder), [2]) == [([], None)] * 2
    steps = lines_of(folder)
    assert [s["fault"] for s in steps] == [None, "the loss is nan", None, None]
    assert [s["skipped"] for s in steps] == [0, 1, 1, 1]
    assert steps[1]["loss"] is None and all(s["loss"] > 1 for s in steps if s["step"] != 2)
    saved = [torch.load(folder / "faults" / f"step_00000002_rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    batches = [s["micro_batches"][0] for s in saved]
    assert [b["sequences"] for b in batches] == [[1], [1]]
    assert sorted(torch.cat([b["rows"] for b in batches]).tolist()) == list(range(128))
    assert all(b["tokens"].shape == b["labels"].shape == (1, len(b["rows"])) for b in batches)
    assert saved[0]["fault"] == "the loss is nan"


def test_too_many_end_the_run_on_every_rank(tmp_path):
    folder = tmp_path / "run"
    for moved, message in run_ranks(2, train_with_bad_steps, str(folder), [2, 3, 4], **{"train.max_skipped": 1}):
        assert moved == []
        assert message.startswith("step 3: the loss is nan, and 1 of the last 100 steps were skipped before it.")
    assert len(lines_of(folder)) == 3


def train_with_a_full_disk(folder, full, **changes):
    """Rank 1's disk is full whenever the model has this many steps; what the run said, and how it ended."""
    write, said = FileSystemWriter.write_data, []

    def write_data(writer, plan, planner):
        if os.environ["RANK"] == "1" and f"step_{full:08d}" in str(writer.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", write_data)
        patch.setattr(metrics.Reporter, "say", lambda reporter, text: said.append(text))
        try:
            train_here(folder, **changes)
        except TrainingError as error:
            return said, str(error)
    return said, None


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_alone(tmp_path, asynchronous):
    """Then the last checkpoint, written in the other way."""
    folder = tmp_path / "run"
    changes = {"checkpoint.every": 1, "checkpoint.asynchronous": asynchronous}
    said, error = run_ranks(2, train_with_a_full_disk, str(folder), 3, **changes)[0]
    assert error is None
    assert any(
        line.startswith("step 3: the checkpoint could not be written (rank 1: OSError: [Errno 28] No space left")
        and line.endswith("step_00000002 stays in force.")
        for line in said
    ), said
    assert names(folder) == ["step_00000002", "step_00000004"]
    assert any(line.startswith("step 4: checkpoint") for line in said)

    # The last one: the run must not end as if all were well.
    changes |= {"checkpoint.asynchronous": not asynchronous, "train.steps": 5}
    for _, error in run_ranks(2, train_with_a_full_disk, str(folder), 5, **changes):
        assert error.startswith("the last checkpoint, of step 5, could not be written: rank 1: OSError: [Errno 28]")
    # What could not be written takes no room.
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert prepare(config_of(folder, **{"train.steps": 5}), 2).state.step == 4


def train_and_say(folder, **changes):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Reporter, "say", lambda reporter, text: said.append(text))
        train_here(folder, **changes)
    return said


def test_a_cut_checkpoint_gives_way_to_the_one_before(tmp_path):
    folder = tmp_path / "run"
    run_ranks(2, train_here, str(folder), **{"checkpoint.every": 2})
    part = next((folder / "checkpoints" / "step_00000004").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    said = run_ranks(2, train_and_say, str(folder), **{"train.steps": 5})[0]
    assert "step_00000004 is damaged" in said[0] and "The one before it is used." in said[0]
    assert said[0].endswith("checkpoints/step_00000002 at step 2")
    assert [s["step"] for s in lines_of(folder)] == [1, 2, 3, 4, 5]
    assert names(folder) == ["step_00000002", "step_00000004.damaged", "step_00000005"]
    for place in checkpoint.complete(folder / "checkpoints"):
        (place / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint under .* can be read: .*step_00000005 .*step_00000002 "):
        prepare(config_of(folder), 2)


def train_and_terminate(folder, **changes):
    """Rank 1 gets SIGTERM in its third step."""
    plain, calls = FsdpEngine.gradients, [0]

    def gradients(engine, batches):
        calls[0] += 1
        if calls[0] == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(engine, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpEngine, "gradients", gradients)
        train_here(folder, **changes)
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path):
    folder = tmp_path / "run"
    assert run_ranks(2, train_and_terminate, str(folder), **{"train.steps": 50}) == [True, True]
    assert len(lines_of(folder)) == 3
    assert names(folder) == ["step_00000003"]


KILLED_WHILE_WRITING = """
import os
import signal
import sys
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

write = FileSystemWriter.write_data


def write_data(writer, plan, planner):
    if "step_00000004" in str(writer.path):
        (Path(writer.path) / "__0_0.distcp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(writer, plan, planner)


FileSystemWriter.write_data = write_data
from tests.train.runs import train_here

train_here(sys.argv[1], **{"checkpoint.every": 2, "parallel.context": 1})
"""


def test_a_kill_while_writing_leaves_the_one_before(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert names(folder) == ["step_00000002", "step_00000004.partial"]
    assert prepare(config_of(folder, **{"parallel.context": 1}), 1).state.step == 2
    run_ranks(2, train_here, str(folder))
    assert names(folder) == ["step_00000002", "step_00000004"]


def ranks_of(process):
    """Process ids of torchrun's ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [e for e in environment if e.startswith(b"RANK=")]
        if rank:
            found[int(rank[0][5:])] = int(child)
    return found


def wait_for(what, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < deadline, "the job has ended, or nothing happens"
        time.sleep(0.05)
    return found


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_killed_rank_is_started_again_and_sigterm_ends_the_job(tmp_path):
    """torchrun as people use it. One start of the job, killed, resumed from its checkpoint, and told to stop."""
    folder = tmp_path / "run"
    changes = BASE | {"train.steps": 100_000, "train.folder": str(folder), "checkpoint.every": 5}
    # "refuse" would refuse the folder of the run itself, were it not known that this is a restart.
    changes["train.if_exists"] = "refuse"
    arguments = [a for name, value in changes.items() for a in (f"--{name}", json.dumps(value).strip('"'))]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "launch/train.py", "--config", "configs/demo_cpu.yaml", *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(checkpoint.complete(folder / "checkpoints")) > 0, process)
        first = ranks_of(process)
        os.kill(first[1], signal.SIGKILL)
        second = wait_for(lambda: (r := ranks_of(process)) and set(r) == {0, 1} and r[0] != first[0] and r, process)
        resumed = wait_for(lambda: sorted((folder / "starts").glob("step_*"))[1:], process)
        at = int(resumed[0].name.removeprefix("step_"))
        assert at >= 5 and at % 5 == 0
        wait_for(lambda: steps_done(folder) > at + 2, process)
        os.kill(second[1], signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    except BaseException as error:
        process.terminate()
        raise AssertionError("\n".join(process.communicate(timeout=60))) from error
    assert process.returncode == 0, err
    # Of rank 1 torchrun tells; rank 0 adds a line at most, and no stack.
    assert "Traceback" not in err, err
    assert f"resuming from {folder}/checkpoints/step_{at:08d} at step {at}" in out
    steps = [s["step"] for s in lines_of(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert f"step {steps[-1]}: ended by SIGTERM" in out
    assert checkpoint.latest(folder / "checkpoints").name == f"step_{steps[-1]:08d}"
