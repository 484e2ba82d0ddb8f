"""Loss by position: bins, sums over ranks, and each token's loss as plain transformers gives it."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fm_longctx.data import IGNORED
from fm_longctx.train import evaluation
from fm_longctx.train.inputs import make_loader
from fm_longctx.train.token_losses import token_losses
from tests.distributed import run_ranks
from tests.train.runs import config_of, lines_of, train_here
from tests.train.tiny import MadeUpStream, tiny_model


def test_bins_are_whole_powers_of_two():
    sums = torch.zeros(2, evaluation.num_bins(9), dtype=torch.float64)
    evaluation.add_(sums, torch.arange(1.0, 10.0), torch.arange(9))
    record = evaluation.record(7, sums)
    assert [(b["first"], b["last"], b["labels"], b["loss"]) for b in record["positions"]] == [
        (0, 0, 1, 1.0),
        (1, 2, 2, 2.5),
        (3, 6, 4, 5.5),
        (7, 14, 2, 8.5),
    ]
    assert record["labels"] == 9 and record["loss"] == 5.0
    assert record["perplexity"] == pytest.approx(148.413, rel=1e-4)


def test_no_position_is_in_the_wrong_bin_far_out():
    positions = torch.tensor([2**20 - 2, 2**20 - 1, 2**24 - 2, 2**24 - 1])
    sums = torch.zeros(2, 25, dtype=torch.float64)
    evaluation.add_(sums, torch.ones(4), positions)
    assert sums[1].nonzero().flatten().tolist() == [19, 20, 23, 24]


def test_each_tokens_loss():
    model = tiny_model()
    packed = MadeUpStream([[37, 26]]).sequence(0)
    hidden = torch.randn(1, 63, 32, generator=torch.Generator().manual_seed(1))
    mine = token_losses(model.causal_lm, hidden, labels=packed.labels[None], chunk=7)
    logits = hidden[0].double() @ model.causal_lm.lm_head.weight.double().t()
    want = F.cross_entropy(logits, packed.labels, reduction="none", ignore_index=IGNORED)
    assert mine.shape == (1, 63) and mine[0, 36] == mine[0, 62] == 0
    assert torch.allclose(mine[0].double(), want, atol=1e-6)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"Held-out document {i}. " * (1 + i % 4))
    return folder


CHANGES = {"eval.every": 2, "eval.steps": 3, "train.steps": 3, "checkpoint.export": True}


def plain_losses(folder, path):
    """Sums of losses and counts by position, of one process with transformers' own attention, document by document."""
    config = config_of(folder, **{"eval.path": str(path)} | CHANGES)
    plain = AutoModelForCausalLM.from_pretrained(folder / "export", attn_implementation="sdpa", dtype=torch.float64)
    sums = torch.zeros(2, 8, dtype=torch.float64)
    loader = make_loader(
        config_of(folder, **{"data.source": "files", "data.path": str(path)}),
        type("OneRank", (), {"dp_rank": 0, "dp_size": 1, "cp_rank": 0, "cp_size": 1, "device": torch.device("cpu")}),
    )
    with torch.no_grad():
        for _ in range(config.eval.steps):
            batch = next(loader)
            starts = [*(batch.positions[0] == 0).nonzero().flatten().tolist(), 128]
            for start, end in itertools.pairwise(starts):
                tokens = batch.tokens[:, start:end]
                logits = plain(tokens, use_cache=False).logits[0, :-1]
                losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
                for position, loss in enumerate(losses.tolist()):
                    sums[:, (position + 1).bit_length() - 1] += torch.tensor([loss, 1.0])
    loader.close()
    return sums


def test_two_ranks_give_what_plain_transformers_gives(held_out, tmp_path):
    """The last evaluation, against the model that the same run exported: so the export is right too."""
    folder = tmp_path / "run"
    run_ranks(2, train_here, str(folder), **CHANGES, **{"eval.path": str(held_out)})
    records = lines_of(folder, "eval.jsonl")
    assert [r["step"] for r in records] == [0, 2, 3]
    assert records[-1]["loss"] < records[0]["loss"]
    sums = plain_losses(folder, held_out)
    want = evaluation.record(3, sums)
    mine = records[-1]
    assert mine["labels"] == want["labels"]
    assert [b["first"] for b in mine["positions"]] == [0, 1, 3, 7, 15, 31, 63]
    for ours, plain in zip(mine["positions"], want["positions"], strict=True):
        assert ours["labels"] == plain["labels"]
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_needs_data():
    with pytest.raises(ValueError, match=r"eval\.every needs eval\.path"):
        config_of("x", **{"eval.every": 2})
    with pytest.raises(ValueError, match=r"eval\.path='/nowhere' does not exist"):
        config_of("x", **{"eval.every": 2, "eval.path": "/nowhere"}).check_world(2)
    assert json.dumps(evaluation.record(1, torch.tensor([[1e6], [1.0]], dtype=torch.float64))["perplexity"]) == "null"
