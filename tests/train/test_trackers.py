"""TensorBoard and Weights & Biases get the figures of metrics.jsonl; profiles and snapshots are written."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from fm_longctx.train import trackers
from fm_longctx.train.profiler import OutOfMemory, Profiler, memory_snapshot
from tests.train.runs import config_of


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    runs = []

    def init(**options):
        runs.append(FakeRun(options))
        return runs[-1]

    ids = iter(["one", "two"])
    fake = SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: next(ids)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_weights_and_biases(wandb, tmp_path):
    config = config_of(tmp_path, **{"log.wandb": "offline", "log.wandb_project": "long"})
    for _ in range(2):
        (tracker,) = trackers.make_trackers(tmp_path, config, start=0)
        tracker.scalars(3, {"step": 3, "loss": 2.5, "mfu": 0.4})
        tracker.close()
    first, resumed = wandb
    assert first.logged == [(3, {"loss": 2.5, "mfu": 0.4})] and first.finished
    assert first.options["mode"] == "offline" and first.options["project"] == "long"
    assert first.options["config"]["train"]["steps"] == 4
    assert first.options["id"] == resumed.options["id"] == "one"


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, **{"log.tensorboard": True})
    for start, steps in ((0, range(1, 5)), (2, range(3, 6))):
        (tracker,) = trackers.make_trackers(tmp_path, config, start=start)
        for step in steps:
            tracker.scalars(step, {"step": step, "loss": 10.0 * start + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb needs the wandb package: pip install wandb"):
        trackers.check_libraries(config_of(tmp_path, **{"log.wandb": "online"}))
    trackers.check_libraries(config_of(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"log\.tensorboard needs the tensorboard package"):
        trackers.check_libraries(config_of(tmp_path, **{"log.tensorboard": True}))


def test_a_trace_of_the_steps_asked_for(tmp_path):
    profiler = Profiler(tmp_path, range(2, 4), rank=0)
    written = []
    for step in range(1, 6):
        profiler.before(step)
        torch.ones(step, 7) @ torch.ones(7, 3)
        written.append(profiler.after(step))
    assert [path is not None for path in written] == [False, False, True, False, False]
    events = json.loads(gzip.decompress(written[2].read_bytes()))["traceEvents"]
    shapes = [e["args"]["Input Dims"][0] for e in events if e.get("name") == "aten::mm"]
    assert shapes == [[2, 7], [3, 7]]


def test_a_run_that_ends_early_still_has_its_trace(tmp_path):
    profiler = Profiler(tmp_path, range(1, 100), rank=0)
    profiler.before(1)
    assert profiler.after(1, last=True).stat().st_size > 0


def test_out_of_memory_leaves_a_snapshot(tmp_path, monkeypatch):
    """There is no GPU to fill here: what is tested is that the snapshot is asked for, and named."""
    asked = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", asked.append)
    with (
        pytest.raises(OutOfMemory, match=r"CUDA out of memory.*rank_3\.pickle"),
        memory_snapshot(tmp_path, rank=3, history=False),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert asked == [str(tmp_path / "memory" / "rank_3.pickle")]
    with pytest.raises(RuntimeError, match="another"), memory_snapshot(tmp_path, rank=3, history=False):
        raise RuntimeError("another")
    assert len(asked) == 1
