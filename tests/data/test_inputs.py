"""The data section of a config as documents, streams and prepared files."""

import json

import pytest
import torch

from fm_longctx.data import FeedStream
from fm_longctx.train import config_load, inputs, prepare_cli
from tests.data import tokenizers

SMALL = {"data.sequence_length": 32, "data.seed": 1}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"the cat {i} " * i}) + "\n" for i in range(12)))
    (tmp_path / "tokenizer").mkdir()
    tokenizers.save(tmp_path / "tokenizer")
    return tmp_path


def config_of(folder, **changes):
    keys = {
        "data.source": "jsonl",
        "data.path": str(folder / "a.jsonl"),
        "data.text_field": "body",
        "data.tokenizer": str(folder / "tokenizer"),
        "data.cache": str(folder / "cache"),
        "model.vocab_size": 400,
    }
    return config_load.build(SMALL | keys | changes)


def test_prepared_once_and_read_again(folder, capsys):
    """The command line, then the same sequences from the files it wrote."""
    yaml = folder / "config.yaml"
    yaml.write_text(config_load.to_yaml(config_of(folder)))
    arguments = ["--config", str(yaml), "--out", str(folder / "out")]
    assert prepare_cli.main(arguments, usage=None) == 0
    assert "12 documents" in capsys.readouterr().out
    assert prepare_cli.main(arguments, usage=None) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder / 'out.bin'} exists already")
    assert prepare_cli.main([*arguments, "--replace", "--workers", "0"], usage=None) == 2

    prepared = {"data.source": "tokens", "data.path": str(folder / "out")}
    for packing in ("concat", "best_fit"):
        want = inputs.make_stream(config_of(folder, **{"data.packing": packing}))
        got = inputs.make_stream(config_of(folder, **prepared, **{"data.packing": packing}))
        assert all(torch.equal(want.sequence(i).tokens, got.sequence(i).tokens) for i in range(20))
    inputs.check(config_of(folder, **prepared))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        inputs.check(config_of(folder, **prepared, **{"data.tokenizer": "bytes"}))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        inputs.check(config_of(folder, **prepared, **{"data.add_bos": False}))
    yaml.write_text(config_load.to_yaml(config_of(folder, **prepared)))
    assert prepare_cli.main([*arguments, "--replace"], usage=None) == 2
    assert "is prepared already" in capsys.readouterr().err


def test_a_stream_of_datasets(folder, capsys):
    pytest.importorskip("datasets").disable_progress_bars()
    config = config_of(folder, **{"data.source": "datasets", "data.streaming": True})
    inputs.check(config)
    stream = inputs.make_stream(config)
    assert isinstance(stream, FeedStream)
    tokenizer = inputs.make_tokenizer(config.data)
    assert tokenizer.decode(stream.sequence(0).tokens[:8].numpy()).startswith("the cat 1")
    yaml = folder / "config.yaml"
    yaml.write_text(config_load.to_yaml(config))
    assert prepare_cli.main(["--config", str(yaml), "--out", str(folder / "out.bin")], usage=None) == 0
    assert "12 documents" in capsys.readouterr().out
    assert prepare_cli.main(["--config", str(yaml), "--out", str(folder / "b"), "--workers", "2"], usage=None) == 2


def test_a_vocabulary_too_small(folder):
    with pytest.raises(ValueError, match=r"has \d+ tokens and the model's vocabulary only 20\. Set model\.vocab_size"):
        inputs.check(config_of(folder, **{"model.vocab_size": 20}))


def test_a_bad_field_is_found_before_the_run(folder):
    with pytest.raises(ValueError, match="it has the fields body"):
        inputs.check(config_of(folder, **{"data.text_field": "text"}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.source": "python_stdlib"}, "data.path is not read with data.source: python_stdlib"),
        ({"data.path": None}, "data.source: jsonl needs data.path"),
        ({"data.max_bytes": 9}, "data.max_bytes is for data.source: python_stdlib or files, but data.source is jsonl"),
        ({"data.streaming": True}, "data.streaming is for data.source: datasets"),
        ({"data.format": "csv"}, "data.format is for data.source: datasets"),
        ({"data.source": "tokens", "data.pattern": "*"}, "data.pattern is for data.source: files or jsonl"),
        ({"data.tokenizer": "bytes", "data.add_bos": False}, "bytes always have both"),
        ({"data.lookahead": 8}, "data.lookahead=8 is for data.balance: area"),
        ({"data.balance": "area", "data.lookahead": 0}, "data.lookahead must be at least 1"),
        ({"data.balance": "area"}, "nothing to balance in a step of one sequence a rank. Set data.lookahead"),
        ({"data.window": 0}, "data.window must be at least 1"),
        ({"data.workers": 0}, "data.workers must be at least 1"),
        ({"data.prefetch": -1}, "data.prefetch must be at least 0"),
    ],
)
def test_keys_that_do_not_go_together(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)


def test_a_tokenizer_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"data\.tokenizer='/nowhere' does not exist"):
        config_of(folder, **{"data.tokenizer": "/nowhere"}).check_world(1)
