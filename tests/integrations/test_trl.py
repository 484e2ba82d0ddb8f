"""TRL's SFTTrainer, packing: what it trains is what the documents alone would, although it puts several into a row."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from fm_longctx.integrations import transformers as integration
from fm_longctx.integrations.transformers import ContextParallelTrainerMixin, DataCollatorForFlashMask
from tests.distributed import run_ranks
from tests.integrations.families import make
from tests.integrations.separate import mean_loss
from tests.integrations.test_trainer import assert_trained, forget

pytest.importorskip("trl")
GENERATOR = torch.Generator().manual_seed(21)
LENGTHS = [21, 2, 33, 16, 4, 29, 11, 7, 3, 26]
DOCUMENTS = [torch.randint(3, 64, (n,), generator=GENERATOR).tolist() for n in LENGTHS]


class Watched:
    """TRL's collator, and what it was given and made."""

    def __init__(self, collator):
        self.collator, self.given, self.made = collator, [], []

    def __call__(self, features):
        batch = self.collator(features)
        self.given.append(features)
        self.made.append(batch)
        return batch


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="w0", eos_token="w2")


def documents_of(features):
    """The documents in what the collator was given, one by one."""
    for feature in features:
        lengths = feature.get("seq_lengths", [len(feature["input_ids"])])
        yield from (part.tolist() for part in torch.as_tensor(feature["input_ids"]).split(list(lengths)))


def configuration(folder, **options):
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def dataset():
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": document} for document in DOCUMENTS])


def logged_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def alone(family, steps):
    """Losses of SGD on the steps' documents one by one; the model, and its weights before."""
    model = make(family, "eager")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = mean_loss(model, [{"input_ids": document} for document in step])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, start


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "family, options",
    [
        # Both kinds of batch that it makes: rows filled with documents, and whole documents one after the other.
        ("llama", {"packing": True, "max_length": 64, "pad_to_multiple_of": 8}),
        ("gemma3", {"padding_free": True, "max_length": None}),
    ],
)
def test_two_steps_equal_the_documents_alone(family, options, tmp_path):
    from trl import SFTTrainer

    forget()
    integration.register()
    arguments = configuration(str(tmp_path), **options)
    model = make(family, integration.NAME)
    trainer = SFTTrainer(model, arguments, train_dataset=dataset(), processing_class=tokenizer())
    trainer.data_collator = watched = Watched(trainer.data_collator)
    trainer.train()
    forget()
    # Accelerate takes a batch more than it needs.
    steps = [list(documents_of(features)) for features in watched.given[:2]]
    assert all(document in DOCUMENTS for step in steps for document in step)
    assert any(len(step) > 2 for step in steps) or "packing" not in options
    assert all(batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch for batch in watched.made)
    losses, exact, start = alone(family, steps)
    assert logged_losses(trainer) == pytest.approx(losses, rel=1e-3)  # it rounds what it logs
    assert_trained(weights(trainer.model), weights(exact), start)


def over_two_ranks(folder):
    from trl import SFTTrainer

    class LongTrainer(ContextParallelTrainerMixin, SFTTrainer):
        pass

    forget()
    integration.register()
    try:
        trainer = LongTrainer(
            make("llama", integration.NAME),
            configuration(folder, max_length=None, data_seed=3),
            train_dataset=dataset(),
            eval_dataset=dataset(),
            data_collator=DataCollatorForFlashMask(context_parallel_size=2),
            processing_class=tokenizer(),
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        return logged_losses(trainer), evaluated, weights(trainer.accelerator.unwrap_model(trainer.model))
    finally:
        forget()


def test_its_sequences_over_two_ranks(tmp_path):
    """With our mixin and our collator; its loss is its own, which takes labels that are shifted already."""
    order = list(DistributedSampler(DOCUMENTS, num_replicas=1, rank=0, shuffle=True, seed=3))
    steps = [[DOCUMENTS[i] for i in order[2 * step : 2 * step + 2]] for step in range(2)]
    losses, exact, start = alone("llama", steps)
    each = [mean_loss(exact, [{"input_ids": d} for d in DOCUMENTS[i : i + 2]]).item() for i in range(0, 10, 2)]
    for logged, evaluated, after in run_ranks(2, over_two_ranks, str(tmp_path), timeout=120):
        assert logged == pytest.approx(losses, rel=1e-3)
        assert evaluated == pytest.approx(sum(each) / len(each), rel=1e-5)
        assert_trained(after, weights(exact), start)
