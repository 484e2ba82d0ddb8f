"""Losses over whole sequences: preference pairs and rewards, packed and sharded, equal the sequences apart."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DistributedSampler
from transformers import AutoModelForTokenClassification, Trainer

from fm_longctx.integrations import transformers as integration
from fm_longctx.integrations.transformers import (
    ContextParallelTrainerMixin,
    DataCollatorForFlashMask,
    dpo_loss,
    reward_loss,
    sequence_log_probs,
    sequence_values,
)
from tests.distributed import run_ranks
from tests.integrations.deepspeed_world import deepspeed_world
from tests.integrations.families import WINDOW, make
from tests.integrations.separate import log_probs, paths
from tests.integrations.test_trainer import arguments, assert_trained, forget, words

BETA = 0.7
RATE = 0.1
CLIP = 0.5
# Lengths that make the ranks' shares of a pair uneven; prompts that are short, and none.
PAIRS = [
    {"prompt_ids": words(14), "chosen_ids": words(5), "rejected_ids": words(2)},
    {"prompt_ids": words(1), "chosen_ids": words(19), "rejected_ids": words(1)},
    {"prompt_ids": [], "chosen_ids": words(4), "rejected_ids": words(9)},
    {"prompt_ids": words(8), "chosen_ids": words(3), "rejected_ids": words(21)},
    {"prompt_ids": words(23), "chosen_ids": words(1), "rejected_ids": words(6)},
    {"prompt_ids": words(3), "chosen_ids": words(2), "rejected_ids": words(2)},
    {"prompt_ids": words(11), "chosen_ids": words(7), "rejected_ids": words(4)},
    {"prompt_ids": words(6), "chosen_ids": words(12), "rejected_ids": words(3)},
]


def frozen(implementation):
    return make("gemma3", implementation, hidden_size=24).requires_grad_(False).eval()


def scorer(implementation):
    """A reward model: a number for every token."""
    config = make("llama", implementation).config
    config.num_labels, config.classifier_dropout = 1, 0.0
    torch.manual_seed(2)
    model = AutoModelForTokenClassification.from_config(config, attn_implementation=implementation)
    model.score.weight.data.normal_(0, 0.3)
    return model.train()


class PreferenceTrainer(ContextParallelTrainerMixin, Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference = sequence_log_probs(self.logits(self.reference, inputs), inputs)
        return dpo_loss(sequence_log_probs(self.logits(model, inputs), inputs), reference, beta=BETA)


class RewardTrainer(ContextParallelTrainerMixin, Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return reward_loss(sequence_values(self.logits(model, inputs), inputs))


def trained(folder, kind):
    forget()
    integration.register()
    try:
        options = {"context_parallel_size": 2, "return_sequence_ids": True}
        if kind == "dpo":
            model, options["sliding_window"], trainer_class = (
                make("gemma3", integration.NAME),
                WINDOW,
                PreferenceTrainer,
            )
        else:
            model, trainer_class = scorer(integration.NAME), RewardTrainer
        collator = DataCollatorForFlashMask(**options)
        data = {"train_dataset": PAIRS, "eval_dataset": PAIRS, "data_collator": collator}
        trainer = trainer_class(model, arguments(folder, max_grad_norm=0.0, learning_rate=RATE), **data)
        trainer.reference = frozen(integration.NAME)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return logged, evaluated, {n: p.detach().clone() for n, p in model.named_parameters()}
    finally:
        forget()


def apart(kind):
    """Each answer after its prompt in a call of its own, each pair by the words of the loss: (model, loss of pairs)."""
    if kind == "dpo":
        model, reference = make("gemma3", "eager"), frozen("eager")

        def loss(pairs):
            gained = log_probs(model, pairs)[0] - log_probs(reference, pairs)[0]
            return -F.logsigmoid(BETA * (gained[0::2] - gained[1::2])).mean()

    else:
        model = scorer("eager")

        def loss(pairs):
            scores = [
                model(torch.tensor([before + answer])).logits[0, -1, 0] for p in pairs for before, answer in paths(p)
            ]
            return -torch.stack([F.logsigmoid(a - b) for a, b in zip(scores[0::2], scores[1::2], strict=True)]).mean()

    return model, loss


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_the_trainer_over_two_ranks_equals_pairs_apart(kind, tmp_path):
    """Two steps of two micro-batches of two pairs."""
    model, loss_of = apart(kind)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    order = list(DistributedSampler(PAIRS, num_replicas=1, rank=0, shuffle=True, seed=3))
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = loss_of([PAIRS[i] for i in order[4 * step : 4 * step + 4]])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    exact = {n: p.detach() for n, p in model.named_parameters()}
    after = loss_of(PAIRS).item()
    for logged, evaluated, weights in run_ranks(2, trained, str(tmp_path), kind, timeout=120):
        assert logged == pytest.approx(losses, rel=1e-3)  # it rounds what it logs
        assert evaluated == pytest.approx(after, rel=1e-5)
        assert_trained(weights, exact, start)


def by_deepspeed():
    """A step of two micro-batches at ZeRO 2, in a loop of one's own: mean of the losses, norm, and the weights."""
    from fm_longctx.integrations import deepspeed as plug

    integration.register()
    with deepspeed_world():
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": CLIP,  # or DeepSpeed clips to 1
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "flashmask": {"context_parallel_size": 2},
        }
        model, reference = make("gemma3", integration.NAME), frozen(integration.NAME)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        engine = plug.initialize(model=model, optimizer=optimizer, config=config)[0]
        collate = engine.flashmask.collator(return_sequence_ids=True, sliding_window=WINDOW)
        total = 0.0
        for first in (0, 2):
            batch = engine.flashmask.prepare(collate(PAIRS[first : first + 2]))
            exact = sequence_log_probs(reference(**batch).logits, batch)
            loss = dpo_loss(sequence_log_probs(engine(**batch, use_cache=False).logits, batch), exact, beta=BETA)
            engine.backward(loss)
            engine.step()
            total += loss.item() / 2
        norm = float(engine.get_global_grad_norm())
        return total, norm, {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def test_a_deepspeed_loop_over_two_ranks_equals_pairs_apart():
    pytest.importorskip("deepspeed")
    model, loss_of = apart("dpo")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = loss_of(PAIRS[:4])
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    exact = {n: p.detach() for n, p in model.named_parameters()}
    for mean, norm_of_ranks, weights in run_ranks(2, by_deepspeed, timeout=120):
        assert mean == pytest.approx(loss.item(), rel=1e-5)
        assert norm_of_ranks == pytest.approx(norm, rel=1e-5)
        assert_trained(weights, exact, start)


MIXED = [PAIRS[0], {"input_ids": words(3)}, {"prompt_ids": words(2), "completion_ids": [words(1), words(2), words(3)]}]


def values_by_rank():
    """Of three ranks, one of which may have no row of a sequence."""
    from fm_longctx.context_parallel import ContextParallel

    rank = dist.get_rank()
    options = {"context_parallel_size": 3, "context_parallel_rank": rank, "return_sequence_ids": True, "chunk_size": 1}
    batch = DataCollatorForFlashMask(**options)(MIXED)
    with pytest.raises(ValueError, match="is only planned"):
        sequence_values(torch.zeros(1, len(batch["input_ids"][0])), batch, num_sequences=6)
    batch["context"] = batch["context"].join(dist.group.WORLD)
    assert isinstance(batch["context"]["full_attention"], ContextParallel)
    place = batch["position_ids"].double() + 0.25
    chosen = sequence_values(place[..., None], batch)
    logits = torch.zeros(1, place.shape[1], 64, requires_grad=True)
    sums = sequence_log_probs(logits, batch)
    sums.sum().backward()
    return chosen, sums.detach(), float(logits.grad.abs().sum())


def test_every_rank_has_the_whole_and_a_gradient_that_averages_right():
    want = torch.tensor([18.25, 15.25, 2.25, 2.25, 3.25, 4.25])
    labels = torch.tensor([5, 2, 2, 1, 2, 3])
    whole = DataCollatorForFlashMask(return_sequence_ids=True, pad_to_multiple_of=8)(MIXED)
    assert torch.equal(sequence_values(whole["position_ids"] + 0.25, whole), want)
    results = run_ranks(3, values_by_rank)
    for chosen, sums, _ in results:
        assert torch.equal(chosen, want)
        assert torch.allclose(sums, -labels * torch.tensor(64.0).log())
    # |softmax - onehot| sums to 2 x 63/64 a label; a mean over ranks of what they hold must be that.
    assert sum(gradient for *_, gradient in results) / 3 == pytest.approx(2 * 63 / 64 * int(labels.sum()), rel=1e-5)


def test_refuses():
    whole = DataCollatorForFlashMask(return_sequence_ids=True)
    tree = whole([{"segments": [words(3), words(2), words(2)], "parents": [-1, 0, 0]}])
    with pytest.raises(ValueError, match=r"sequences \[0\] of this batch have no last token of their own"):
        sequence_values(torch.zeros(1, tree["input_ids"].shape[1]), tree)
    empty = whole([{"prompt_ids": words(3), "chosen_ids": words(2), "rejected_ids": []}])
    with pytest.raises(ValueError, match=r"sequences \[1\] of this batch"):
        sequence_values(torch.zeros(1, empty["input_ids"].shape[1]), empty, num_sequences=2)
    with pytest.raises(ValueError, match="has no sequence_ids"):
        sequence_log_probs(torch.zeros(1, 3, 64), DataCollatorForFlashMask()([{"input_ids": words(3)}]))
    for loss in (reward_loss, lambda x: dpo_loss(x, x)):
        with pytest.raises(ValueError, match=r"\[2 x pairs\], chosen and rejected by turns, got \[3\]"):
            loss(torch.zeros(3))
