"""Checkpoints: going on is as if never stopped, bit for bit; what is broken or another model's is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fm_longctx.train import checkpoint, config_load
from fm_longctx.train.loop import run
from fm_longctx.train.model import huggingface_config
from fm_longctx.train.start import prepare
from tests.distributed import run_ranks

BASE = {
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_hidden_layers": 2,
    "model.head_dim": 8,
    "data.sequence_length": 128,
    "data.max_bytes": 300,
    "parallel.context": 2,
    "parallel.chunk_size": 8,
    "optimizer.lr": 0.01,
    "schedule.warmup_steps": 3,
    "train.steps": 20,
    "train.gradient_accumulation": 2,
    "train.device": "cpu",
    "train.if_exists": "resume",
}


def train(folder, ranks, **changes):
    """Run the launcher's own two calls on a pool of ranks; the steps of metrics.jsonl."""
    values = BASE | {"train.folder": str(folder)} | changes
    run_ranks(ranks, train_on_rank, values)
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def train_on_rank(values):
    config = config_load.build(values)
    run(config, prepare(config, 2 if values["parallel.context"] == 2 else 1))


def tensors(folder, tmp_path):
    """Everything in a run's last checkpoint, flat."""
    out = tmp_path / "whole.pt"
    dcp_to_torch_save(checkpoint.latest(Path(folder) / "checkpoints"), out)
    flat = {}

    def walk(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(torch.load(out, weights_only=False), "")
    return flat


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, train(folder, 2)


def test_ten_and_ten_are_twenty_bit_for_bit(straight, tmp_path):
    folder, steps = straight
    halves = tmp_path / "halves"
    first = train(halves, 2, **{"train.stop_at": 10})
    assert [s["step"] for s in first] == list(range(1, 11))
    # A run that was killed after its checkpoint has later steps in its metrics; they are done again.
    with (halves / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(first[-1] | {"step": 11, "loss": 99.0}) + '\n{"step": 12, "lo')
    second = train(halves, 2)
    assert [s["step"] for s in second] == list(range(1, 21))
    for name in ("loss", "grad_norm", "lr", "visible_fraction", "labels"):
        assert [s[name] for s in second] == [s[name] for s in steps], name
    mine, want = tensors(halves, tmp_path), tensors(folder, tmp_path)
    assert mine.keys() == want.keys()
    assert any("exp_avg_sq" in name for name in mine)
    assert any("random_1_cpu" in name for name in mine)
    for name, value in want.items():
        same = torch.equal(mine[name], value) if isinstance(value, torch.Tensor) else mine[name] == value
        assert same, name


def test_loss_falls(straight):
    steps = straight[1]
    assert steps[0]["loss"] == pytest.approx(5.55, abs=0.1)
    assert sum(s["loss"] for s in steps[-5:]) / 5 < steps[0]["loss"] - 1


def test_goes_on_on_another_number_of_ranks(straight, tmp_path):
    """Same data, same weights: the loss agrees to float32 rounding."""
    folder = tmp_path / "one"
    train(folder, 2, **{"train.stop_at": 15})
    steps = train(folder, 1, **{"parallel.context": 1})
    assert [s["step"] for s in steps] == list(range(1, 21))
    for mine, want in zip(steps, straight[1], strict=True):
        assert mine["loss"] == pytest.approx(want["loss"], rel=2e-4)


def test_the_run_folder(straight):
    folder, steps = straight
    assert config_load.load(folder / "config.yaml").train.steps == 20
    assert (folder / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000020"]
    start = folder / "starts" / "step_00000000"
    assert config_load.load(start / "config.yaml") == config_load.load(folder / "config.yaml")
    environment = json.loads((start / "environment.json").read_text())
    assert environment["libraries"]["torch"] == torch.__version__
    assert environment["ranks"] == 2 and environment["variables"]["WORLD_SIZE"] == "2"
    assert len(json.loads((start / "git.json").read_text())["commit"]) == 40
    assert steps[0].keys() >= {"step", "loss", "tokens_per_second", "visible_fraction", "grad_norm", "lr", "imbalance"}
    assert all(0 < s["visible_fraction"] < 0.51 and s["tokens_per_second"] > 0 for s in steps)


def test_old_checkpoints_go(tmp_path):
    changes = {"train.steps": 5, "checkpoint.every": 1, "checkpoint.keep": 2, "train.gradient_accumulation": 1}
    train(tmp_path / "run", 2, **changes)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000004", "step_00000005"]


def config_of(folder, **changes):
    return config_load.build(BASE | {"train.folder": str(folder)} | changes)


def test_a_folder_that_holds_a_run(straight):
    with pytest.raises(ValueError, match="holds a run already"):
        prepare(config_of(straight[0], **{"train.if_exists": "refuse"}), 2)
    assert prepare(config_of(straight[0], **{"train.if_exists": "replace"}), 2) is None
    assert prepare(config_of(straight[0]), 2).state.step == 20


def test_another_model_is_refused(straight):
    with pytest.raises(ValueError, match="of another model: hidden_size 32 there, 64 here"):
        prepare(config_of(straight[0], **{"model.hidden_size": 64}), 2)


@pytest.fixture
def copy(straight, tmp_path):
    place = checkpoint.latest(straight[0] / "checkpoints")
    return Path(shutil.copytree(place, tmp_path / place.name))


def inspect(place):
    return checkpoint.inspect(place, huggingface_config(config_of("x").model, max_length=128), "fsdp")


def test_a_checkpoint_given_by_path(copy, tmp_path):
    resume = prepare(config_of(tmp_path / "new", **{"checkpoint.load": str(copy)}), 2)
    assert (resume.path, resume.state.step) == (copy, 20)
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        prepare(config_of(tmp_path / "new", **{"checkpoint.load": str(tmp_path / "nowhere")}), 2)


def test_broken_checkpoints_are_refused(copy):
    inspect(copy)
    part, metadata = next(copy.glob("*.distcp")), copy / ".metadata"
    whole, known = part.read_bytes(), metadata.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"is damaged: .*distcp should have {len(whole)} bytes and is {len(whole) // 2}"
    ):
        inspect(copy)
    part.unlink()
    with pytest.raises(ValueError, match="and is missing"):
        inspect(copy)
    part.write_bytes(whole)
    metadata.write_bytes(b"x" * len(known))
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        inspect(copy)
    metadata.write_bytes(known)
    inspect(copy)
    (copy / "run.json").write_text('{"format": 2, "step": 3}')
    with pytest.raises(ValueError, match=r"run\.json lacks \['data', 'engine', 'files'"):
        inspect(copy)
    (copy / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="it has format 99, and this version reads format 2"):
        inspect(copy)


def test_what_a_kill_left_half_written_is_not_looked_at(straight, tmp_path):
    folder = Path(shutil.copytree(straight[0], tmp_path / "run"))
    (folder / "checkpoints" / "step_00000030.partial").mkdir()
    assert prepare(config_of(folder), 2).state.step == 20


def test_another_engine_is_told_how_to_take_the_weights(copy):
    with pytest.raises(ValueError, match=r"engine: fsdp, and deepspeed cannot read its optimizer.*launch/export\.py"):
        checkpoint.inspect(copy, huggingface_config(config_of("x").model, max_length=128), "deepspeed")
