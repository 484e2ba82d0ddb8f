"""The deterministic mode repeats every loss bit for bit, and they are those of dense masks in plain transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fm_longctx.context_parallel import attention
from fm_longctx.data import IGNORED
from fm_longctx.train.engines.optimizer import make_optimizer
from fm_longctx.train.inputs import make_loader
from fm_longctx.train.model import build, materialize
from fm_longctx.train.schedule import learning_rate_factor
from tests.distributed import run_ranks
from tests.train.runs import config_of, lines_of, train_here

CHANGES = {"train.steps": 12, "train.deterministic": True, "schedule.warmup_steps": 2, "checkpoint.at_end": False}


def train_and_watch(folder):
    """Train; what attention's backward was told, and torch's mode afterwards."""
    told = set()
    plain = attention.attention_backward

    def watched(*args, deterministic, **kwargs):
        told.add(deterministic)
        return plain(*args, deterministic=deterministic, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention_backward", watched)
        train_here(folder, **CHANGES)
    return told, torch.are_deterministic_algorithms_enabled()


def dense_reference(folder, changes, device):
    """The losses of one process, transformers' own attention, a dense mask from each document's bounds."""
    config, device = config_of(folder, **changes), torch.device(device)
    ours = build(config.model, max_length=config.data.sequence_length)
    materialize(ours, config.model, device=device, seed=config.train.seed)
    plain = AutoModelForCausalLM.from_config(ours.causal_lm.config, attn_implementation="sdpa")
    plain.to(device).load_state_dict(ours.causal_lm.state_dict())
    optimizer = make_optimizer(plain.parameters(), config.optimizer, device)
    loader = make_loader(
        config,
        type("OneRank", (), {"dp_rank": 0, "dp_size": 1, "cp_rank": 0, "cp_size": 1, "device": device}),
    )
    losses = []
    for step in range(config.train.steps):
        batch = next(loader).to(device)
        document = (batch.positions[0] == 0).cumsum(0)
        visible = (document[:, None] == document[None, :]).tril()
        logits = plain(
            batch.tokens, attention_mask=visible[None, None], position_ids=batch.positions, use_cache=False
        ).logits
        loss = F.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate_factor(step, config.train.steps, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    loader.close()
    return losses


def test_bit_for_bit_and_as_with_a_dense_mask(tmp_path):
    first = run_ranks(2, train_and_watch, str(tmp_path / "first"))
    assert first == [({True}, False)] * 2
    run_ranks(2, train_and_watch, str(tmp_path / "second"))
    one, other = lines_of(tmp_path / "first"), lines_of(tmp_path / "second")
    for name in ("loss", "grad_norm"):
        assert [s[name] for s in one] == [s[name] for s in other], name
    want = dense_reference(tmp_path / "first", CHANGES, "cpu")
    assert want[-1] < want[0] - 0.5
    assert [s["loss"] for s in one] == pytest.approx(want, rel=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bit_for_bit_and_as_with_a_dense_mask_on_a_gpu(tmp_path):
    changes = CHANGES | {
        "model.hidden_size": 256,
        "model.intermediate_size": 512,
        "model.num_attention_heads": 4,
        "model.num_key_value_heads": 2,
        "model.head_dim": 64,
        "data.sequence_length": 2048,
        "data.max_bytes": 1500,
        "parallel.context": 1,
        "parallel.chunk_size": None,
        "optimizer.lr": 1e-3,
        "train.device": "cuda",
    }
    for name in ("first", "second"):
        train_here(tmp_path / name, **changes)
    one, other = lines_of(tmp_path / "first"), lines_of(tmp_path / "second")
    for name in ("loss", "grad_norm"):
        assert [s[name] for s in one] == [s[name] for s in other], name
    want = dense_reference(tmp_path / "first", changes, "cuda")
    assert want[-1] < want[0] - 0.5
    found = [s["loss"] for s in one]
    print("largest difference to a dense mask", max(abs(a / b - 1) for a, b in zip(found, want, strict=True)))
    assert found == pytest.approx(want, rel=2e-5)
