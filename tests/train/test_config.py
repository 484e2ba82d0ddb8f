"""Defaults < YAML < command line, and what each mistake is told."""

import dataclasses
from pathlib import Path

import pytest

from fm_longctx.train import config_load
from fm_longctx.train.config import Config

ROOT = Path(__file__).parents[2]


def load(tmp_path, text, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return config_load.load(path, overrides)


def test_command_line_over_yaml_over_defaults(tmp_path):
    config = load(tmp_path, "train: {steps: 30, seed: 4}\noptimizer:\n", "--train.steps", "20", "--optimizer.lr=3e-4")
    assert (config.train.steps, config.train.seed, config.train.log_every) == (20, 4, 10)
    assert config.optimizer.lr == 3e-4


def test_values_take_their_fields_type(tmp_path):
    config = load(
        tmp_path,
        "optimizer: {lr: 1e-3, eps: 1, clip_norm: null}\ndata: {source: files, path: 7}",
        "--model.tie_word_embeddings=false",
    )
    assert config.optimizer.lr == 0.001
    assert config.optimizer.eps == 1.0 and isinstance(config.optimizer.eps, float)
    assert config.optimizer.clip_norm is None
    assert config.data.path == "7"
    assert config.model.tie_word_embeddings is False


def test_resolved_config_loads_as_itself(tmp_path):
    config = load(tmp_path, "train: {steps: 30}", "--optimizer.lr", "1e-5")
    assert load(tmp_path, config_load.to_yaml(config)) == config


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("train: {stpes: 3}", [], r"unknown key train\.stpes\. Did you mean train\.steps\?"),
        ("", ["--train.stpes", "3"], r"unknown key train\.stpes\. Did you mean train\.steps\?"),
        ("", ["--train.batch_size", "3"], r"Did you mean data\.batch_size\?"),
        ("trian: {steps: 3}", [], r"unknown section 'trian'\. Did you mean train\?"),
        ("train: 3", [], "train must hold fields"),
        ("- 1", [], "must hold sections"),
        ("a: [", [], "not valid YAML"),
        ("", ["--train.steps"], "needs a value"),
        ("", ["--train.steps", "--train.seed", "1"], "--train.steps needs a value"),
        ("", ["train.steps", "1"], "overrides look like"),
        ("", ["--train.steps", "many"], r"train\.steps must be of type int, got 'many'"),
        ("", ["--train.steps", "1.5"], "must be of type int, got 1.5"),
        ("", ["--train.steps", "true"], "must be of type int, got True"),
        ("", ["--optimizer.lr", "true"], "must be of type float, got True"),
        ("", ["--model.tie_word_embeddings", "1"], "must be of type bool, got 1"),
        ("", ["--data.source", "web"], r"data\.source must be one of python_stdlib, files, .*, got 'web'"),
        ("", ["--train.steps", "0"], r"train\.steps must be at least 1, got 0"),
        ("", ["--optimizer.lr", "0"], r"optimizer\.lr must be above 0"),
        ("", ["--optimizer.lr", "nan"], r"optimizer\.lr must be above 0, got nan"),
        ("", ["--optimizer.beta2", "1"], r"optimizer\.beta2 must be in \[0, 1\)"),
        ("", ["--model.num_key_value_heads", "3"], "must divide model.num_attention_heads"),
        ("", ["--model.head_dim", "7"], "must be even"),
        ("", ["--model.vocab_size", "256"], "at least 258"),
        ("", ["--data.source", "files"], "needs data.path"),
        ("", ["--data.path", "x"], "is not read with data.source: python_stdlib"),
        ("", ["--schedule.kind", "wsd"], "decay_steps is the length of wsd's fall"),
        ("", ["--schedule.warmup_steps", "101"], "is 101, more than train.steps=100"),
        ("", ["--parallel.ranks", "6", "--parallel.context", "4"], r"Set parallel\.context to one of \[1, 2, 3, 6\]"),
        ("", ["--parallel.context", "4", "--parallel.head_parallel", "3"], "head_parallel=3 does not divide"),
        ("", ["--parallel.context", "9000"], "leaves some of the 9000 context ranks without a token"),
    ],
)
def test_mistakes(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text, *overrides)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read the config"):
        config_load.load(tmp_path / "none.yaml")


def test_world():
    config = config_load.build({"parallel.context": 2})
    config.check_world(4)
    with pytest.raises(ValueError, match="context=2 does not divide the 3 ranks"):
        config.check_world(3)
    with pytest.raises(ValueError, match="ranks=8 but 4 ranks were started"):
        config_load.build({"parallel.ranks": 8}).check_world(4)
    with pytest.raises(ValueError, match=r"data\.path='/nowhere/at/all' does not exist"):
        config_load.build({"data.source": "files", "data.path": "/nowhere/at/all"}).check_world(1)


def test_every_field_is_documented_and_in_the_help():
    text = config_load.help_text()
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            assert f"--{section.name}.{field.name} " in text
    assert all(field.doc for field in config_load.fields().values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_load_and_name_their_command(path):
    config = config_load.load(path)
    assert f"--config configs/{path.name}" in path.read_text()
    assert config.train.folder == f"runs/{path.stem}"
