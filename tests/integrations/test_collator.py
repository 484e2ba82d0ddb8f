"""DataCollatorForFlashMask: what is packed has the loss and the gradients that its sequences have apart."""

import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fm_longctx import FlashMask
from fm_longctx.integrations import transformers as integration
from fm_longctx.integrations.transformers import DataCollatorForFlashMask, sequence_log_probs
from tests.integrations.families import WINDOW, assert_close, make
from tests.integrations.separate import log_probs

GENERATOR = torch.Generator().manual_seed(7)


def words(n):
    return torch.randint(3, 64, (n,), generator=GENERATOR).tolist()


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def apart(family, features):
    """Each sequence alone: its log-probability, and the gradients of the sum of all losses."""
    model = make(family, "eager")
    sums, _ = log_probs(model, features)
    (-sums.sum()).backward()
    return {"sums": sums.detach()} | {n: p.grad for n, p in model.named_parameters()}


def packed(family, features, **options):
    """All in one call: their log-probabilities, and the gradients of the model's own loss, as a Trainer has it."""
    model = make(family, integration.NAME)
    batch = DataCollatorForFlashMask(return_sequence_ids=True, **options)(features)
    ids = {"sequence_ids": batch.pop("sequence_ids")}
    out = model(**batch, use_cache=False, num_items_in_batch=1)
    out.loss.backward()
    sums = sequence_log_probs(out.logits.detach(), batch | ids)
    assert torch.allclose(out.loss.detach(), -sums.sum(), rtol=1e-5)
    return {"sums": sums} | {n: p.grad for n, p in model.named_parameters()}


DOCUMENTS = [{"input_ids": words(n)} for n in (11, 1, 17)]
PAIRS = [
    {"prompt_ids": words(8), "chosen_ids": words(5), "rejected_ids": words(13)},
    {"prompt_ids": words(1), "chosen_ids": words(2), "rejected_ids": words(1)},
    {"prompt_ids": [], "chosen_ids": words(4), "rejected_ids": words(3)},
]
COMPLETIONS = [
    {"prompt_ids": words(12), "completion_ids": [words(3), words(9), words(1), words(6)]},
    {"prompt_ids": words(4), "completion_ids": [words(5)]},
]
TREES = [
    {
        "segments": [words(n) for n in (6, 3, 1, 5, 4, 7, 2, 0, 3)],
        "parents": [-1, 0, 1, 2, 2, 1, 0, 0, 7],
    },
    {"segments": [words(1), words(2), words(3)], "parents": [-1, 0, 0]},
]
MIXED = [*DOCUMENTS, *PAIRS, *COMPLETIONS, *TREES]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_equals_apart(family):
    options = {"sliding_window": WINDOW} if family == "gemma3" else {}
    assert_close(packed(family, MIXED, pad_to_multiple_of=16, **options), apart(family, MIXED))


def test_what_pairs_share_is_there_once_but_for_its_last_token():
    batch = DataCollatorForFlashMask()(PAIRS[:1])
    q, chosen, rejected = (PAIRS[0][key] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert batch["input_ids"][0].tolist() == [*q[:-1], q[-1], *chosen, q[-1], *rejected]
    assert batch["position_ids"][0].tolist() == [*range(7), *range(7, 13), *range(7, 21)]
    ignored = [-100] * 8
    assert batch["labels"][0].tolist() == [*ignored, *chosen, -100, *rejected]


def test_reward_pairs_share_what_both_begin_with():
    """TRL's reward data: whole sequences."""
    q, a, b = words(9), [3, *words(4)], [4, *words(6)]
    whole = {"chosen_ids": q + a, "rejected_ids": q + b}
    split = {"prompt_ids": q, "chosen_ids": a, "rejected_ids": b}
    got, want = DataCollatorForFlashMask()([whole]), DataCollatorForFlashMask()([split])
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert got["flashmask"].fingerprint() == want["flashmask"].fingerprint()


def test_labels_that_are_given_are_kept():
    tokens = words(6)
    labels = [-100, -100, *tokens[2:]]
    batch = DataCollatorForFlashMask(pad_to_multiple_of=4, pad_token_id=9)([{"input_ids": tokens, "labels": labels}])
    assert batch["labels"][0].tolist() == [-100, -100, *tokens[2:], -100, -100]
    assert batch["input_ids"][0].tolist() == [*tokens, 9, 9]
    assert batch["position_ids"][0].tolist() == [*range(6), 0, 1]
    assert batch["flashmask"].fingerprint() == FlashMask.from_lengths([6, 2]).fingerprint()


@pytest.mark.parametrize("size, strategy", [(2, "balanced"), (3, "balanced"), (2, "zigzag")])
def test_shards_together_are_the_whole(size, strategy):
    features = MIXED
    whole = DataCollatorForFlashMask(sliding_window=WINDOW, return_sequence_ids=True)(features)
    options = {
        "sliding_window": WINDOW,
        "return_sequence_ids": True,
        "context_parallel_size": size,
        "strategy": strategy,
    }
    parts = [
        pickle.loads(pickle.dumps(DataCollatorForFlashMask(context_parallel_rank=r, **options)))(features)
        for r in range(size)
    ]
    parts = pickle.loads(pickle.dumps(parts))  # a dataloader's worker sends them so
    plan = parts[0]["context"].plan
    assert plan.strategy == strategy
    assert {part["context"].plan.fingerprint() for part in parts} == {plan.fingerprint()}
    for key in ("input_ids", "position_ids", "sequence_ids"):
        assert torch.equal(plan.unshard([part[key] for part in parts], 1), whole[key]), key
    labels = plan.unshard([part["shift_labels"] for part in parts], 1)
    assert torch.equal(F.pad(labels[:, :-1], (1, 0), value=-100), whole["labels"])
    assert all(torch.equal(part["labels"], part["shift_labels"]) for part in parts)
    for kind, mask in whole["flashmask"].items():
        assert parts[0]["context"].masks[kind].fingerprint() == mask.fingerprint()
    with pytest.raises(ValueError, match="pass num_sequences="):
        sequence_log_probs(torch.zeros(1, parts[0]["input_ids"].shape[1], 64), parts[0])
    logits = torch.randn(1, whole["input_ids"].shape[1], 64)
    want = sequence_log_probs(logits, whole)
    got = sum(
        sequence_log_probs(plan.shard(logits, r, 1), part, num_sequences=len(want)) for r, part in enumerate(parts)
    )
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_rank_is_the_environments(monkeypatch):
    monkeypatch.setenv("RANK", "7")
    assert DataCollatorForFlashMask(context_parallel_size=3).context_parallel_rank == 1


def test_a_planned_context_must_be_joined():
    batch = DataCollatorForFlashMask(context_parallel_size=2, context_parallel_rank=0)(DOCUMENTS)
    with pytest.raises(ValueError, match=r"context must be a ContextParallel.*join"):
        make("llama", integration.NAME)(**batch, use_cache=False)


@pytest.mark.parametrize(
    "options, features, message",
    [
        ({}, [], "at least one feature"),
        ({}, [{"text": "x"}], r"has the keys \['text'\]"),
        ({}, [{"input_ids": [1, 2], "labels": [1]}], "got 1 for 2"),
        ({}, [{"input_ids": [[1, 2]]}], "input_ids must hold integers"),
        ({}, [{"segments": [[1], [2], [3]], "parents": [-1, 0]}], "one entry a node"),
        ({}, [{"segments": [[1], [2]], "parents": [-1, 1]}], r"parents\[1\] must be -1"),
        ({}, [{"segments": [[1]] * 4, "parents": [-1, 0, 0, 1]}], "depth-first"),
        ({"max_length": 28}, DOCUMENTS, "pack into 29 tokens, above max_length=28"),
        ({}, [{"input_ids": []}], "no tokens"),
    ],
)
def test_refuses(options, features, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForFlashMask(**options)(features)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"context_parallel_size": 2, "context_parallel_rank": 2}, r"must be in 0..1, got 2"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForFlashMask(**options)


def test_a_worker_that_collates_imports_neither_kernels_nor_models():
    program = (
        "import sys; from fm_longctx.integrations.transformers import DataCollatorForFlashMask as C;"
        "C(context_parallel_size=2, context_parallel_rank=0)([{'input_ids': [1, 2, 3]}]);"
        "assert not {'triton', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
