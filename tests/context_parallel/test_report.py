"""The report: its counts by dense counting, its text and picture, and the command line around it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fm_longctx import FlashMask, ShardPlan
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.mask import builders
from fm_longctx.train.plan_cli import main

ROOT = Path(__file__).parents[2]
COST = CostModel(kv_heads=2, head_dim=64, host_ranks=2)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_bytes_and_scores_of_each_stage(num_stages):
    mask = builders.causal_document([50, 51])
    plan = ShardPlan.build(mask, 4, chunk_size=5, num_stages=num_stages, cost=COST)
    report = plan.report()
    bytes_of_key = 2 * 2 * 64 * 2
    for rank in range(4):
        for s, stage in enumerate(plan.local(rank).stages):
            if s == 0 or num_stages in (2, 4):
                assert report.scores[rank, s] == pytest.approx(int(stage.mask.area().sum()))
            received, sent = np.array(stage.receive_counts) * bytes_of_key, np.array(stage.send_counts) * bytes_of_key
            assert report.received[rank, s] == received.sum() and report.sent[rank, s] == sent.sum()
            other_host = np.arange(4) // 2 != rank // 2
            assert report.far[rank, s] == max(received[other_host].sum(), sent[other_host].sum())
    assert report.received.sum() == report.sent.sum() > 0 and report.far.sum() > 0


def test_several_masks_batches_and_heads_are_one_average_layer():
    n, generator = 60, torch.Generator().manual_seed(0)
    visible = torch.rand(2, 3, n, n, generator=generator) < 0.4
    heads = FlashMask.from_dense(visible, max_intervals=n)
    plan = ShardPlan.build([heads, builders.causal(n)], 3, weights=[1, 3])
    report = plan.report()
    for rank in range(3):
        rows = plan.rows(rank)
        both = int(visible[:, :, rows].sum()) / 3 + 3 * int(builders.causal(n).to_dense()[0, 0, rows].sum())
        assert report.scores[rank].sum() == pytest.approx(both / 4)


def brute_floor(visible, world_size, tolerance):
    n = visible.shape[-1]
    area = visible.sum(1).double()
    cap = float(area.sum()) / world_size * (1 + tolerance)
    total = 0
    for column in range(n):
        rows = visible[:, column]
        ranks = max(-(-float(area[rows].sum()) // cap), -(-int(rows.sum()) // -(-n // world_size)))
        total += max(0, ranks - 1)
    return total / (n * (world_size - 1))


@pytest.mark.parametrize(
    "mask",
    [builders.causal(60), builders.document([40, 20]), builders.sliding_window(60, 25), builders.full(60)],
    ids=["causal", "document", "window", "full"],
)
def test_the_floor_by_counting(mask):
    plan = ShardPlan.build(mask, 3)
    expected = brute_floor(mask.to_dense()[0, 0], 3, 0.02)
    assert plan.floor() == pytest.approx(expected)
    if plan.imbalance <= 1.02:
        assert plan.received_fraction >= plan.floor() - 1e-12


def test_the_text_says_what_was_counted():
    plan = ShardPlan.build(builders.causal_document([700, 300]), 4)
    text = str(plan.report())
    assert f"{plan.imbalance:.3f}" in text and f"{plan.received_fraction:.3f}" in text
    assert "modelled" in text and "% of ideal" in text
    assert len(re.findall(r"^ +[0-3] +250 ", text, re.MULTILINE)) == 4
    many = str(ShardPlan.build(builders.causal(640), 64).report())
    assert "of 64 ranks" in many and len(many.splitlines()) < 30
    assert "nothing to do" in str(ShardPlan.build(builders.full(0), 2).report())


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture(tmp_path, suffix):
    path = tmp_path / f"plan.{suffix}"
    ShardPlan.build(builders.causal_document([700, 300]), 4).report().draw(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and len(content) > 5_000
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        ShardPlan.build(builders.full(4), 2).report().draw(tmp_path / "plan.pdf")


def test_bars_have_their_ranks_colours():
    from matplotlib.colors import to_rgb

    from fm_longctx.mask.draw import palette

    figure = ShardPlan.build(builders.causal(64), 4).report()._figure()
    bars = figure.axes[1].patches
    assert [to_rgb(bar.get_facecolor()) for bar in bars] == [pytest.approx(c) for c in palette(4)]
    assert np.mean([bar.get_width() for bar in bars]) == pytest.approx(1.0)


def test_the_command_line(capsys, tmp_path):
    assert main(["--lengths", "700,300", "--ranks", "4", "--draw", str(tmp_path / "p.png")], usage="words") == 0
    assert "1,000 tokens over 4 ranks" in capsys.readouterr().out and (tmp_path / "p.png").exists()
    assert main(["--lengths", "900", "--ranks", "3", "--strategy", "zigzag", "--window", "64"], usage="") == 0
    assert "strategy zigzag" in capsys.readouterr().out
    assert main(["--config", str(ROOT / "configs/demo_cpu.yaml"), "--ranks", "3", "--bandwidth", "1e9"], usage="") == 0
    out = capsys.readouterr().out
    assert "over 3 ranks" in out and "bandwidth=1000000000.0" in out and "heads=2, kv_heads=1, head_dim=32" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lengths", "10,x", "--ranks", "2"], "--lengths must be integers"),
        (["--lengths", "10,0", "--ranks", "2"], "at least 1 each"),
        (["--lengths", "10"], "--ranks 8"),
        (["--lengths", "10", "--ranks", "0"], "--ranks must be at least 1"),
        (["--lengths", "10", "--ranks", "two"], "invalid int value"),
        (["--lengths", "10", "--ranks", "2", "--strategy", "zigzg"], "Did you mean 'zigzag'"),
        (["--lengths", "10", "--ranks", "2", "--mask", "full", "--window", "3"], "needs --mask causal"),
        (["--lengths", "10", "--ranks", "2", "--bandwidth", "-1"], "CostModel.bandwidth must be positive"),
        (["--lengths", "10", "--ranks", "2", "--draw", "plan.pdf"], ".png or .svg"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
        (["--ranks", "2"], "--lengths"),
        (["--lengths", "10", "--ranks", "2", "--speed", "9"], "--speed"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(arguments, usage="") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_help_is_complete():
    done = subprocess.run(
        [sys.executable, "launch/plan.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    for word in ("--lengths", "--config", "--strategy", "--draw", "--kv-heads", "--hidden-price", "python launch/plan"):
        assert word in done.stdout
