"""A model saved here loads in transformers, with the same logits; and here again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fm_longctx import FlashMask
from fm_longctx.train import export
from fm_longctx.train.checkpoint import latest
from fm_longctx.train.config import ModelConfig
from fm_longctx.train.model import build, materialize
from tests.distributed import run_ranks
from tests.train.runs import train_here

ROOT = Path(__file__).parents[2]
SHAPE = {"model.tie_word_embeddings": False, "train.steps": 2, "model.rope_theta": 5e5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(2, train_here, str(folder), **SHAPE, **{"checkpoint.export": True, "checkpoint.export_dtype": "bfloat16"})
    return folder


def logits_here(folder):
    """Of our own model with the folder's weights, from its hidden states."""
    config = ModelConfig(path=str(folder))
    model = build(config, max_length=128)
    materialize(model, config, device=torch.device("cpu"), seed=0)
    tokens = torch.arange(64)[None]
    hidden = model.causal_lm.base_model(
        input_ids=tokens,
        position_ids=torch.arange(64)[None],
        use_cache=False,
        flashmask=FlashMask.from_lengths([64]),
    ).last_hidden_state
    return hidden @ model.causal_lm.get_output_embeddings().weight.t()


def logits_in_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return model(torch.arange(64)[None], use_cache=False).logits


def test_same_logits_in_one_file_and_in_many(trained, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "weights.bin").write_text("no")
    written = export.export(trained, tmp_path / "one", tokenizer=tokenizer)
    assert [p.name for p in written] == ["config.json", "model.safetensors", "tokenizer.json"]
    many = export.export(latest(trained / "checkpoints"), tmp_path / "many", max_file_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files < {p.name for p in many}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in build_plain(tmp_path / "one").parameters())
    want = logits_in_transformers(tmp_path / "one")
    assert torch.equal(logits_in_transformers(tmp_path / "many"), want)
    assert torch.allclose(logits_here(tmp_path / "many"), want, atol=1e-5)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"


def build_plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_run_exports_what_its_checkpoint_holds(trained, tmp_path):
    """At the end of the run, in bfloat16, from the model in training; and by the script, from the checkpoint."""
    command = [sys.executable, "launch/export.py", "--checkpoint", str(trained), "--out", str(tmp_path / "out")]
    subprocess.run([*command, "--dtype", "bfloat16"], cwd=ROOT, check=True, capture_output=True)
    mine, script = build_plain(trained / "export").state_dict(), build_plain(tmp_path / "out").state_dict()
    assert mine.keys() == script.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, script[name]) for name, value in mine.items())


def test_mistakes(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export.export(trained, tmp_path / "full")
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        export.export(tmp_path, tmp_path / "out")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        export.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
