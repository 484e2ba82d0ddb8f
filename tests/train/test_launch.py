"""The launcher as people start it: the demo for a few steps, and one message for each mistake."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fm_longctx.train import cli

ROOT = Path(__file__).parents[2]
DEMO = ["--config", "configs/demo_cpu.yaml"]
TINY = [
    *("--model.hidden_size", "32", "--model.intermediate_size", "48", "--model.num_hidden_layers", "1"),
    *("--data.sequence_length", "256", "--data.max_bytes", "400", "--schedule.warmup_steps", "0"),
]


def launch(*arguments, ranks=2, script="launch/train.py"):
    """Exit code, standard output and standard error; ranks=0 is plain python."""
    runner = [sys.executable]
    if ranks:
        runner += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*runner, script, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        # The ranks are in sessions of torchrun's making; ending torchrun gently ends them.
        process.terminate()
        raise
    return process.returncode, out, err


def test_the_demo_for_a_few_steps(tmp_path, monkeypatch, capsys):
    code, out, err = launch(*DEMO, *TINY, "--train.steps", "3", "--train.folder", str(tmp_path / "run"))
    assert code == 0, err
    assert "data 1 x context 2" in out
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[0]["loss"] == pytest.approx(5.6, abs=0.4)
    found = {p.name for p in (tmp_path / "run").iterdir()}
    assert found == {"config.yaml", "mask.png", "metrics.jsonl", "checkpoints", "starts"}

    # The same folder, for another model: refused before any process group is made.
    again = ["--train.folder", str(tmp_path / "run"), "--train.if_exists", "resume", "--model.num_hidden_layers=2"]
    code, _, err = on_each_of_two_ranks(monkeypatch, capsys, *DEMO, *TINY, *again)
    assert code == 2 and not dist.is_initialized()
    assert err.startswith("error: ") and "is of another model: num_hidden_layers 1 there, 2 here" in err


def on_each_of_two_ranks(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of rank 0, in this process; rank 1 must end alike and be silent."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        ended.append((cli.main(arguments, usage=""), *capsys.readouterr()))
    assert ended[0] == (ended[1][0], "", "")
    return ended[1]


def only_message(err, words):
    """One rank's message, no stack of ours, and torchrun's summary (which repeats it as the cause) after it."""
    ours = [line for line in err.splitlines() if line.startswith("error: ") or "rank 1: " in line]
    assert len(ours) == 1 and words in ours[0], err
    assert "fm_longctx/train" not in err, err


def test_bad_input_under_torchrun():
    """The last of what is refused: the whole config is right, and what it names is not there."""
    began = time.monotonic()
    code, out, err = launch(*DEMO, "--data.source=files", "--data.path=/nowhere/at/all")
    assert code != 0
    only_message(err, "data.path='/nowhere/at/all' does not exist")
    assert not out
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--train.stpes", "3"], "unknown key train.stpes. Did you mean train.steps?"),
        (["--parallel.context", "3"], "parallel.context=3 does not divide the 2 ranks of this job"),
    ],
)
def test_bad_input_is_one_line_of_rank_0(arguments, words, monkeypatch, capsys):
    code, out, err = on_each_of_two_ranks(monkeypatch, capsys, *DEMO, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and len(err.splitlines()) == 1


FAILS_ON_ONE_RANK = """
import sys

import torch.distributed as dist

from fm_longctx.train import cli, engines, loop, step


def run(config, resume):
    world = engines.start(config)
    if world.rank == 1:
        raise step.TrainingError("the second rank gives up")
    dist.barrier()


loop.run = run
sys.exit(cli.main(sys.argv[1:], usage=""))
"""


def test_a_failure_of_one_rank_ends_the_job_with_its_message(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ON_ONE_RANK)
    code, _, err = launch(*DEMO, "--train.folder", str(tmp_path / "run"), script=str(script))
    assert code != 0
    assert [line for line in err.splitlines() if line.startswith(("error: ", "rank "))] == [
        "rank 1: error: the second rank gives up"
    ]


def test_help_and_dry_run_need_no_ranks(monkeypatch, capsys):
    code, out, _ = launch("--help", ranks=0)
    assert code == 0
    assert "torchrun --nproc-per-node 2 launch/train.py" in out and "--parallel.context int (default 1)" in out
    monkeypatch.chdir(ROOT)
    assert cli.main(["--config", "configs/llama70b_128k.yaml", "--dry-run"], usage="") == 0
    out = capsys.readouterr().out
    assert "70,553,706,496 parameters" in out and "64 ranks = data 8 x context 8" in out
    assert "all wait for the heaviest; data.balance and data.lookahead even them" in out
    assert cli.main([*DEMO, "--dry-run", "--parallel.ranks", "3"], usage="") == 2
    err = capsys.readouterr().err
    assert err.splitlines() == [err.strip()] and "does not divide the 3 ranks" in err
