"""The example as people start it: a few steps on two ranks, and its checkpoint continued on one; and what docs say."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TINY = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--vocab-size", "32", "--seq-length", "97", "--lr", "1e-2", "--train-iters", "6"),
]


def launch(ranks, *arguments):
    """[(iteration, loss, gradient norm, labels)] that the script printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = ["tests/integrations/megatron/on_cpu.py", "examples/megatron_pretrain.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *script, *TINY, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert process.returncode == 0, err
    lines = re.findall(r"iteration +(\d+) \| lm loss (\S+) \| grad norm (\S+) \| labels (\d+)", out)
    return [(int(i), float(loss), float(norm), int(labels)) for i, loss, norm, labels in lines]


def test_two_context_parallel_ranks_and_a_checkpoint_that_one_rank_continues(tmp_path):
    distributed = ["--context-parallel-size", "2", "--use-distributed-optimizer"]
    steps = launch(2, *distributed, "--save", str(tmp_path), "--save-interval", "3")
    assert [i for i, *_ in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0][1] == pytest.approx(3.47, abs=0.1)  # log 32
    assert steps[-1][1] < steps[0][1] - 0.3
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000003", "iter_0000006"}

    continued = launch(1, "--use-distributed-optimizer", "--load", str(tmp_path / "iter_0000003"))
    assert [i for i, *_ in continued] == [4, 5, 6]
    for (_, loss, norm, labels), (_, expected_loss, expected_norm, expected_labels) in zip(
        continued, steps[3:], strict=True
    ):
        assert labels == expected_labels
        assert loss == pytest.approx(expected_loss, abs=2e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


def test_the_flags_for_70b_are_flags(monkeypatch):
    """They are parsed, make a valid configuration of that many parameters, and fit the GPUs that they name."""
    script = runpy.run_path(str(ROOT / "examples" / "megatron_pretrain.py"), run_name="example")
    command = re.search(r"torchrun --nnodes .*?(?=\n\n)", script["__doc__"], re.DOTALL)[0].replace("\\\n", " ")
    before, after = command.split("examples/megatron_pretrain.py")
    monkeypatch.setattr(sys, "argv", ["megatron_pretrain.py", *shlex.split(after)])
    args = script["parse_arguments"]()
    config = script["core_transformer_config"](args)
    assert config.sequence_parallel and config.bf16 and config.recompute_granularity == "full"

    nodes, each = (int(re.search(rf"--{name} (\d+)", before)[1]) for name in ("nnodes", "nproc-per-node"))
    shared = config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size
    assert nodes * each % shared == 0 and args.seq_length == 128 * 1024
    assert args.seq_length % (config.context_parallel_size * config.tensor_model_parallel_size) == 0
    h, grouped = config.hidden_size, config.kv_channels * config.num_query_groups
    layer = 2 * h * h + 2 * h * grouped + 3 * h * config.ffn_hidden_size + 2 * h
    assert config.num_layers * layer + 2 * args.vocab_size * h + h == 70_553_706_496  # as Llama 3's


def test_what_the_page_names_exists():
    from fm_longctx.integrations import megatron

    page = (ROOT / "docs" / "megatron.md").read_text()
    (imported,) = re.findall(r"from fm_longctx\.integrations\.megatron import (.*)", page)
    assert {name.strip() for name in imported.split(",")} < set(megatron.__all__)
    assert all(hasattr(megatron, name) for name in megatron.__all__)
    for change in re.findall(r"```diff\n(.*?)```", page, re.DOTALL):
        assert 1 < sum(line.startswith(("+", "-")) for line in change.splitlines()) < 10
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
    for name in re.findall(r"(?:tests|examples)/[\w/]+\.py", page):
        assert (ROOT / name).exists(), name
