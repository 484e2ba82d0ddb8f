"""The tasks from config to run folder: losses fall, adapters alone are saved and go on bit for bit, peft reads them."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from examples.task_records import main as write_records
from fm_longctx.train import checkpoint, config_load
from fm_longctx.train.engines import make_engine, start
from fm_longctx.train.loop import run
from fm_longctx.train.model import build, materialize
from fm_longctx.train.start import prepare
from fm_longctx.train.tasks.export import export_adapters
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[2]


def train_on_rank(name, overrides):
    config = config_load.load(ROOT / "configs" / f"{name}_cpu.yaml", overrides)
    run(config, prepare(config, 2))


def train(name, folder, *overrides):
    """A config on two context ranks; the steps of metrics.jsonl."""
    given = ["--train.folder", str(folder), *overrides]
    run_ranks(2, train_on_rank, name, given, timeout=120.0)
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_the_toy_records_are_what_the_script_writes(records):
    for name, (_, path) in records.items():
        assert Path(path).read_text() == (ROOT / "examples" / "records" / f"{name}.jsonl").read_text()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for name in ("sft", "dpo", "reward"):
        write_records(name, str(folder / f"{name}.jsonl"))
    return {name: ["--data.path", str(folder / f"{name}.jsonl")] for name in ("sft", "dpo", "reward")}


def mean(steps, name):
    return sum(s[name] for s in steps) / len(steps)


def test_sft_learns(records, tmp_path):
    steps = train("sft", tmp_path / "run", *records["sft"])
    assert steps[0]["loss"] == pytest.approx(math.log(258), abs=0.3)
    assert mean(steps[-5:], "loss") < 3.5


def test_reward_learns(records, tmp_path):
    steps = train("reward", tmp_path / "run", *records["reward"])
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert mean(steps[-5:], "loss") < 0.6
    assert mean(steps[-5:], "reward_accuracy") > 0.65
    assert mean(steps[-5:], "reward_margin") > 0


LORA = ["--train.steps", "12", "--checkpoint.every", "6"]


@pytest.fixture(scope="module")
def straight(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    return folder, train("dpo", folder, *records["dpo"], *LORA)


def test_dpo_learns_with_adapters(straight):
    steps = straight[1]
    # With B = 0 the policy is the reference, to the last bit.
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["dpo_margin"] == 0
    assert mean(steps[-3:], "loss") < 0.5
    assert mean(steps[-3:], "dpo_accuracy") > 0.9
    assert steps[-1]["dpo_margin"] == pytest.approx(
        steps[-1]["dpo_chosen_reward"] - steps[-1]["dpo_rejected_reward"], abs=1e-5
    )


def tensors(folder, tmp_path):
    """What a run's last checkpoint holds of model and optimizer, flat."""
    out = tmp_path / "whole.pt"
    dcp_to_torch_save(checkpoint.latest(Path(folder) / "checkpoints"), out)
    content = torch.load(out, weights_only=False)
    moments = {
        f"{name} {kind}": value
        for name, state in content["optimizer"]["state"].items()
        for kind, value in state.items()
    }
    return content["model"], moments


def test_adapters_alone_are_saved_and_go_on_bit_for_bit(straight, records, tmp_path):
    folder, steps = straight
    resume = [*records["dpo"], *LORA, "--train.if_exists", "resume"]
    first = train("dpo", tmp_path / "halves", *resume, "--train.stop_at", "6")
    assert len(first) == 6
    second = train("dpo", tmp_path / "halves", *resume)
    for name in ("loss", "grad_norm", "dpo_margin", "dpo_accuracy"):
        assert [s[name] for s in second] == [s[name] for s in steps], name
    (mine, moments), (want, want_moments) = tensors(tmp_path / "halves", tmp_path), tensors(folder, tmp_path)
    # 2 layers x 7 projections x A and B.
    assert len(want) == 28 and all(".lora_" in name for name in want)
    assert mine.keys() == want.keys() and all(torch.equal(mine[name], want[name]) for name in want)
    assert moments.keys() == want_moments.keys() and len(moments) == 28 * 3
    assert all(torch.equal(moments[name], want_moments[name]) for name in moments)


def export_on_rank(folder, overrides, out):
    config = config_load.load(ROOT / "configs" / "dpo_cpu.yaml", overrides)
    resume = prepare(config, 2)
    engine = make_engine(config, start(config))
    checkpoint.load(resume.path, engine, resume.state)
    export_adapters(engine, config, Path(out))


def test_peft_reads_the_exported_adapters(straight, records, tmp_path):
    folder, _ = straight
    overrides = ["--train.folder", str(folder), *records["dpo"], *LORA, "--train.if_exists", "resume"]
    run_ranks(2, export_on_rank, folder, overrides, str(tmp_path / "adapters"))
    config = config_load.load(ROOT / "configs" / "dpo_cpu.yaml")
    start_of = build(config.model, max_length=509)
    materialize(start_of, config.model, device=torch.device("cpu"), seed=config.train.seed)
    plain = AutoModelForCausalLM.from_config(start_of.causal_lm.config, attn_implementation="sdpa")
    plain.load_state_dict(start_of.causal_lm.state_dict())
    tokens = torch.arange(40)[None]
    before = plain(tokens).logits

    # By hand: W + alpha / r B A.
    merged = copy.deepcopy(plain)
    adapters, _ = tensors(folder, tmp_path)
    for name, a in adapters.items():
        if ".lora_A." in name:
            b = adapters[name.replace(".lora_A.", ".lora_B.")]
            weight = merged.get_parameter(name.replace(".lora_A.default", ""))
            weight.data += config.lora.alpha / config.lora.r * b @ a
    want = merged(tokens).logits
    assert (want - before).abs().max() > 0.1
    got = PeftModel.from_pretrained(plain, str(tmp_path / "adapters"))(tokens).logits
    assert (got - want).abs().max() < 1e-4


def test_a_frozen_base_in_bfloat16(records, tmp_path):
    """The base is kept in bfloat16, the adapters in float32; a reward model's head trains beside them."""
    lora = ["--lora.r", "2", "--train.precision", "bfloat16", "--train.steps", "12"]
    steps = train("reward", tmp_path / "run", *records["reward"], *lora, "--train.activation_checkpointing", "full")
    assert mean(steps[-4:], "loss") < mean(steps[:4], "loss")
    weights, moments = tensors(tmp_path / "run", tmp_path)
    assert len(weights) == 29 and "score.weight" in weights
    assert {w.dtype for w in [*weights.values(), *moments.values()]} == {torch.float32}
