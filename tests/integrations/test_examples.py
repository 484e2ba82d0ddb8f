"""The examples run, and what they train learns."""

import runpy
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.integrations.deepspeed_world import deepspeed_world

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def losses_of(name, *arguments):
    return runpy.run_path(str(EXAMPLES / name))["main"](list(arguments))


def packing(ranks):
    from tests.integrations.test_trainer import forget

    forget()
    try:
        return losses_of("transformers_packing.py", "--cpu", f"--ranks-per-sequence={ranks}", "--steps=6")
    finally:
        forget()


def long_context():
    with deepspeed_world():
        return losses_of("deepspeed_long_context.py", "--steps=6")


def assert_learns(losses):
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_transformers_packing(ranks):
    for losses in run_ranks(ranks, packing, ranks, timeout=250):
        assert_learns(losses)


def test_deepspeed_long_context():
    pytest.importorskip("deepspeed")
    for losses in run_ranks(2, long_context, timeout=250):
        assert_learns(losses)
