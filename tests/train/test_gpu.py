"""Runs on a GPU: every way of keeping activations, asynchronous checkpoints, and repeatable losses."""

from unittest import mock

import pytest
import torch

from fm_longctx.train import offload
from fm_longctx.train.profiler import OutOfMemory
from tests.train.runs import config_of, lines_of, train_here

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {
    "model.hidden_size": 512,
    "model.intermediate_size": 1024,
    "model.num_hidden_layers": 3,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.head_dim": 128,
    "data.sequence_length": 4096,
    "data.max_bytes": 8192,
    "parallel.context": 1,
    "parallel.chunk_size": None,
    "optimizer.lr": 1e-3,
    "train.steps": 6,
    "train.device": "cuda",
    "train.precision": "bfloat16",
    "train.deterministic": True,
}
MODES = {
    "none": {},
    "full": {"train.activation_checkpointing": "full"},
    "selective": {"train.activation_checkpointing": "selective"},
    "selective, MLP kept": {"train.activation_checkpointing": "selective", "train.mlp_kept": 2},
    "full, offloaded": {"train.activation_checkpointing": "full", "train.activation_offload": True},
    "selective, offloaded": {"train.activation_checkpointing": "selective", "train.activation_offload": True},
}


def losses(folder):
    return [line["loss"] for line in lines_of(folder)]


def test_every_mode_gives_the_same_losses_to_the_bit(tmp_path):
    """Offloaded activations return as they were, on streams of their own, and a repeated run repeats its losses."""
    moved = 0
    for name, mode in {**MODES, "none, again": {}}.items():
        with mock.patch.object(offload, "_Offloaded", wraps=offload._Offloaded) as leaves:
            train_here(tmp_path / name, **SMALL, **mode, **{"checkpoint.at_end": False})
        moved += leaves.call_count
        assert bool(leaves.call_count) == ("offloaded" in name), name
        assert losses(tmp_path / name) == losses(tmp_path / "none"), name
    assert moved
    assert losses(tmp_path / "none")[-1] < losses(tmp_path / "none")[0]


def test_resumes_from_an_asynchronous_checkpoint_to_the_bit(tmp_path):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    (held_out / "text.txt").write_text("what nobody has read before; " * 250)
    evaluation = {"eval.every": 3, "eval.steps": 1, "eval.path": str(held_out)}
    mode = MODES["selective, offloaded"] | evaluation | {"checkpoint.every": 2}
    train_here(tmp_path / "whole", **SMALL, **mode)
    train_here(tmp_path / "cut", **SMALL, **mode, **{"train.stop_at": 4})
    assert len(losses(tmp_path / "cut")) == 4
    train_here(tmp_path / "cut", **SMALL, **mode)
    assert config_of(tmp_path, **SMALL).checkpoint.asynchronous
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert lines_of(tmp_path / "cut", "eval.jsonl")[-1] == lines_of(tmp_path / "whole", "eval.jsonl")[-1]


def test_compiled_layers_train_as_the_others_do(tmp_path):
    """Not to the bit: what is fused is rounded less often."""
    for name, compiled in (("plain", False), ("compiled", True)):
        mode = MODES["selective, MLP kept"] | {"train.compile": compiled, "checkpoint.at_end": False}
        mode |= {"train.profile_steps": "4-5"}
        train_here(tmp_path / name, **SMALL | {"train.deterministic": False}, **mode)
    for plain, compiled in zip(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), strict=True):
        assert compiled == pytest.approx(plain, rel=5e-3)
    assert (tmp_path / "compiled" / "profile" / "steps_4-5_rank_0.json.gz").stat().st_size
    last = lines_of(tmp_path / "compiled")[-1]
    assert 0 < last["mfu"] < 1 and last["peak_memory_gib"] > 0


def test_stochastic_rounding_trains(tmp_path):
    pytest.importorskip("torchao")
    mode = MODES["full"] | {"train.precision": "bfloat16_stochastic", "train.mlp_chunk": 1024}
    train_here(tmp_path / "run", **SMALL | mode, **{"train.deterministic": False, "checkpoint.at_end": False})
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_out_of_memory_leaves_a_snapshot(tmp_path):
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    # Room for the weights, and for little more.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / whole)
    try:
        with pytest.raises(OutOfMemory, match="memory_viz"):
            train_here(tmp_path / "run", **SMALL, **{"train.memory_history": True, "data.batch_size": 8})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (tmp_path / "run" / "memory" / "rank_0.pickle").stat().st_size
