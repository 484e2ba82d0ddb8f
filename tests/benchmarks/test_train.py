"""The training benchmark on a CPU: rows, refusals, wrong arms, going on, the report."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import train, train_run
from benchmarks.train_cells import SECTIONS, SHAPES, cells
from benchmarks.train_run import batches
from fm_longctx.data import IGNORED


def rows_of(folder):
    (path,) = folder.glob("*-train.jsonl")
    return {(r["section"], r["competitor"]): r for r in map(json.loads, path.read_text().splitlines())}


def test_smoke_writes_rows_as_they_come_and_goes_on(tmp_path, capsys, monkeypatch):
    arguments = ["--smoke", "--out", str(tmp_path), "--cells", "speed", "convergence", "--commit", "abc"]
    train.main([*arguments, "--limit", "0"])
    assert not list(tmp_path.glob("*.jsonl"))
    train.main(arguments)
    rows = rows_of(tmp_path)
    ours, dense = rows["speed", "ours"], rows["speed", "dense"]
    assert ours["status"] == dense["status"] == "ok"
    assert ours["losses"] == pytest.approx(dense["losses"], rel=1e-3)
    assert ours["grad_norms"] == pytest.approx(dense["grad_norms"], rel=1e-3)
    assert rows["speed", "flex"]["status"] == "refused"
    text = next(tmp_path.glob("*-train.md")).read_text()
    assert "FlexAttention has no backward on a CPU" in text and "Largest difference of a step's loss" in text
    assert len(next(tmp_path.glob("*-convergence.csv")).read_text().splitlines()) == 5
    assert next(tmp_path.glob("*-convergence.png")).stat().st_size > 1000
    # The same command again has nothing left to do.
    monkeypatch.setattr(train, "measure", lambda *_: pytest.fail("measured again"))
    train.main(arguments)
    capsys.readouterr()


def test_a_wrong_arm_has_no_speed(tmp_path, capsys, monkeypatch):
    right = train_run.train_arms.dense
    # The smoke's pack is one document: a mask that cuts it in two.
    monkeypatch.setitem(train_run.train_arms.MAKERS, "dense", lambda lengths, *rest: right([96, 96], *rest))
    train.main(["--smoke", "--out", str(tmp_path), "--cells", "speed", "--only", "ours", "dense", "--commit", "abc"])
    row = rows_of(tmp_path)["speed", "dense"]
    assert row["status"] == "wrong" and "tokens_per_second" not in row
    capsys.readouterr()


def test_what_fails_is_a_row_and_the_next_arm_runs(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(train_run.train_arms.MAKERS, "ours", fails)
    train.main(["--smoke", "--out", str(tmp_path), "--cells", "speed", "--only", "ours", "dense", "--commit", "abc"])
    rows = rows_of(tmp_path)
    assert rows["speed", "ours"]["status"] == "failed" and "out of memory" in rows["speed", "ours"]["reason"]
    assert rows["speed", "dense"]["status"] == "ok"
    capsys.readouterr()


def test_the_cells_have_names_of_their_own_and_valid_configs():
    keys = [cell.key for section in SECTIONS for cell in cells(section)]
    assert len(set(keys)) == len(keys)
    for section in SECTIONS:
        for cell in cells(section):
            assert cell.config("cuda").train.activation_checkpointing == cell.checkpointing
    assert SHAPES["8b"].num_hidden_layers == 8 * SHAPES["8b_eighth"].num_hidden_layers


def test_match_chooses_and_orders(capsys):
    def keys(*arguments):
        return [cell.key for cell in train.chosen(train.parse([*arguments]))]

    everything = keys()
    found = keys("--match", "n1048576", "speed/1b", "1b/n131072/selective/compile/kept4")
    assert [key.split("/")[:3] for key in found] == [
        ["million", "1b", "n1048576"],
        ["speed", "1b", "n131072"],
        ["speed", "1b", "n32768"],
        ["speed", "1b", "n65536"],
    ]
    assert set(found) < set(everything)
    with pytest.raises(SystemExit, match="--match n7 is in no key of --cells speed"):
        keys("--cells", "speed", "--match", "n32768", "n7")


def test_a_large_dense_mask_is_attended_in_strips_of_rows(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    mask = train_run.train_arms.dense([3, 4], torch.device("cpu"), torch.float32)["attention_mask"]
    module = SimpleNamespace(num_key_value_groups=2, training=False, is_causal=True)
    whole, _ = train_run.train_arms._sdpa_in_strips(module, q, k, v, mask)
    monkeypatch.setattr(train_run.train_arms, "MOST_SCORES", 14)
    strips, _ = train_run.train_arms._sdpa_in_strips(module, q, k, v, mask)
    torch.testing.assert_close(strips, whole)


def test_packs_fill_the_sequence_and_are_the_same_for_every_arm():
    (cell,) = cells("convergence")
    for section in (cell, cells("million")[0]):
        lengths, tokens = next(batches(section, 258))
        again = next(batches(section, 258))
        assert sum(lengths) == len(tokens) == section.n and max(lengths) <= 131072
        assert lengths == again[0] and tokens.equal(again[1])
        assert int(tokens.min()) >= 0 > IGNORED
