"""The benchmarks of this room run at tiny size on a CPU; their figures there mean nothing, their bookkeeping does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import context_parallel as replay
from benchmarks.packs import pack

ROOT = Path(__file__).parents[2]
SHAPE = ["--tokens", "64", "--heads", "4", "2", "--head-dim", "16", "--dtype", "float32", "--device", "cpu"]


def run_replay(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["context_parallel", *SHAPE, "--commit", "none", *arguments])
    replay.main()


def test_replay_counts_resumes_and_tells_measured_from_modelled(monkeypatch, tmp_path, capsys):
    some = ["--masks", "causal", "document", "--repeats", "1", "--out", str(tmp_path)]
    run_replay(monkeypatch, *some, "--sizes", "4", "--ranks-sampled", "2", "--layouts", "balanced", "all_gather")
    (path,) = tmp_path.glob("*-context_parallel.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["mask"], row["layout"]) for row in rows] == [
        (mask, layout) for mask in ("causal", "document") for layout in ("balanced", "all_gather")
    ]
    n = 4 * 64
    for row in rows:
        assert len(row["replayed"]) == 2 and len(row["measured_forward_seconds"]) == 2
        assert row["total_forward_tflops"] <= row["compute_forward_tflops"]
        assert row["modelled_backward_seconds"][0] >= sum(row["measured_backward_seconds"][0])
    assert rows[0]["flops_a_rank"] == 4 * 16 * 4 * n * (n + 1) / 2 / 4
    # One pass, with keys that are waited for: what is exchanged costs the link's latency at least.
    assert rows[0]["stages"] == 1 and rows[0]["received"] < 1
    own, others = rows[0]["measured_forward_seconds"][0]
    assert own == 0 and rows[0]["modelled_forward_seconds"][0] >= others + 3e-5
    assert len(rows[1]["measured_forward_seconds"][0]) == 1 and rows[1]["received"] == 1
    text = path.with_suffix(".md").read_text()
    assert "Compute is measured; the exchange is modelled" in text and "2 of 4" in text and "MagiAttention" in text
    assert "64 ranks" not in text
    # The pack nearest to the mean area.
    areas = [sum(m * (m + 1) // 2 for m in pack(n, seed)) for seed in range(20)]
    distance = [abs(area - sum(areas) / 20) for area in areas]
    assert distance[rows[2]["seed"]] == min(distance) and rows[0]["seed"] is None

    capsys.readouterr()
    run_replay(monkeypatch, *some, "--sizes", "4", "--ranks-sampled", "2", "--resume", str(path))
    again = json.loads(path.read_text())["rows"]
    assert again[:4] == rows and len(again) == 10
    assert len(capsys.readouterr().out.splitlines()) == 6
    # A plan without head parallelism is the same one, measured once.
    assert again[4]["layout"] == "keys" and again[4]["identity"] == rows[0]["identity"]
    assert again[4]["measured_forward_seconds"] == rows[0]["measured_forward_seconds"]


def test_rows_measured_again_replace_the_old_ones(monkeypatch, tmp_path, capsys):
    some = ["--sizes", "2", "--repeats", "1", "--ranks-sampled", "1", "--layouts", "balanced", "zigzag"]
    old, new = tmp_path / "old", tmp_path / "new"
    run_replay(monkeypatch, *some, "--masks", "sliding_window", "causal", "--out", str(old))
    (path,) = old.glob("*.json")
    earlier = json.loads(path.read_text())
    earlier["about"]["commit"] = "before"
    for row in earlier["rows"]:
        del row["commit"]
        row["flops_a_rank"] = -1.0
    path.write_text(json.dumps(earlier))

    again = [*some, "--resume", str(path), "--again", "--out", str(new)]
    # A case that was not begun keeps its old row.
    run_replay(monkeypatch, *again, "--masks", "sliding_window", "--limit", "1e-9")
    assert not list(new.glob("*.json"))
    capsys.readouterr()
    run_replay(monkeypatch, *again, "--masks", "sliding_window")
    (path,) = new.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    found = [(row["mask"], row["layout"], row["flops_a_rank"] > 0, row["commit"]) for row in rows]
    assert found == [
        ("sliding_window", "balanced", True, "none"),
        ("sliding_window", "zigzag", True, "none"),
        ("causal", "balanced", False, "before"),
        ("causal", "zigzag", False, "before"),
    ]
    text = path.with_suffix(".md").read_text()
    assert "- at commit none: 2 rows of sliding_window\n- at commit before: 2 rows of causal\n" in text
    # What this run has measured already is not measured again, nor brought back from the old file.
    capsys.readouterr()
    run_replay(monkeypatch, *again, "--masks", "sliding_window", "full")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["full", "full"]
    assert json.loads(path.read_text())["rows"][:4] == rows


def test_replay_shows_no_speed_of_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(replay, "merge_", lambda out, lse, part, part_lse: out.add_(part))
    with pytest.raises(SystemExit, match=r"error: causal, rank .* no speed is shown"):
        run_replay(monkeypatch, "--masks", "causal", "--sizes", "2")
    assert capsys.readouterr().out == ""


def test_heads_that_ulysses_cannot_split_are_said(monkeypatch, capsys):
    run_replay(monkeypatch, "--masks", "causal", "--sizes", "8", "--layouts", "ulysses", "--repeats", "1")
    assert "8 ranks do not divide 4 query heads" in capsys.readouterr().out


def test_ranks_against_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.context_parallel_ranks"]
    command += [*SHAPE, "--transport", "gloo", "--masks", "causal_document", "prefix_tree", "--out", str(tmp_path)]
    command += ["--time", "--time-tokens", "32", "--time-heads", "4", "2", "--repeats", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-context_parallel_ranks-gloo-2.jsonl")
    rows = [json.loads(text) for text in path.read_text().splitlines()][1:]
    asked = [(1, 0), (1, 1), (2, 0)]
    found = [(row["mask"], row["head_parallel"], row["own_stage"]) for row in rows if not row["chosen"]]
    assert found == [(mask, *layout) for mask in ("causal_document", "prefix_tree") for layout in asked]
    assert [row["mask"] for row in rows if row["chosen"]] == ["causal_document", "prefix_tree"]
    assert all(row["ok"] for row in rows)
    for row in rows:
        timed = row["timed"]
        assert timed["tokens"] == 64 and row["checked"]["tokens"] == 128
        assert timed["forward_seconds_exposed"] == pytest.approx(
            timed["forward_seconds"] - timed["forward_seconds_without_exchange"]
        )
        # Head parallelism over all ranks exchanges no keys.
        assert (timed["forward_bytes_at_most"] > 0) == (timed["head_parallel"] == 1)


def test_a_layout_that_is_another_one_is_measured_once(monkeypatch, capsys):
    calls = []
    once = replay.replay
    monkeypatch.setattr(replay, "replay", lambda *args: calls.append(args) or once(*args))
    some = ["--masks", "causal", "--sizes", "4", "--repeats", "1", "--ranks-sampled", "1"]
    run_replay(monkeypatch, *some, "--layouts", "balanced", "keys", "zigzag", "--host-ranks", "2")
    assert len(calls) == 1 and "4.5e+10 bytes/s between hosts of 2 ranks" in capsys.readouterr().out
    run_replay(monkeypatch, *some, "--layouts", "balanced", "--limit", "1e-9")
    assert "causal 4 balanced: not begun, --limit is over" in capsys.readouterr().out


def test_verdicts_are_of_the_balanced_plan_on_packed_causal_documents():
    row = dict(mask="causal_document", layout="balanced", compute_forward_tflops=400.0, total_backward_tflops=361.0)
    rows = [row | dict(ranks=8, total_forward_tflops=918.0), row | dict(ranks=64, total_forward_tflops=119.5)]
    rows[1]["compute_forward_tflops"] = 300.0
    text = "".join(replay.verdicts([*rows, dict(mask="full", layout="balanced", ranks=16)]))
    assert "at 64 ranks is 75% of that at 8" in text
    assert "918 / 361 modelled in all, 459 / 361 published: 2.00 and 1.00 times" in text and ": 0.50 and" in text
    assert "16 ranks" not in text
