"""The Hugging Face Trainer over sharded sequences, with torch's data parallelism and with DeepSpeed: as on one rank."""

import os
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler
from transformers import Trainer, TrainingArguments

from fm_longctx.integrations import transformers as integration
from fm_longctx.integrations.transformers import ContextParallelTrainerMixin, DataCollatorForFlashMask
from tests.distributed import run_ranks
from tests.integrations.deepspeed_world import deepspeed_world
from tests.integrations.families import WINDOW, make
from tests.integrations.separate import mean_loss

GENERATOR = torch.Generator().manual_seed(13)
CLIP = 0.5


def words(n):
    return torch.randint(3, 64, (n,), generator=GENERATOR).tolist()


FEATURES = [
    {"input_ids": words(21)},
    {"prompt_ids": words(14), "chosen_ids": words(2), "rejected_ids": words(1)},
    {"input_ids": words(33)},
    {"segments": [words(5), words(4), words(7)], "parents": [-1, 0, 0]},
    {"input_ids": words(4)},
    {"prompt_ids": words(9), "completion_ids": [words(8), words(3), words(2)]},
    {"input_ids": words(29)},
    {"input_ids": words(2)},
]


class LongTrainer(ContextParallelTrainerMixin, Trainer):
    pass


def arguments(folder, **changes):
    options = {
        "output_dir": folder,
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**options, **changes})


def forget():
    """Accelerate keeps the process group of the last call, and in the environment that it used DeepSpeed or FSDP."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@contextmanager
def fsdp_on_cpu():
    """accelerate shards on accelerators alone, and on a CPU uses DDP without a word: it is told that this is one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    told = ("gloo", DistributedType.MULTI_GPU)
    with (
        mock.patch.object(PartialState, "_prepare_backend", lambda self, *args: told),
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"),
    ):
        yield


def trained(folder, family, engine):
    """Logged losses, the loss of an evaluation after training, and the weights."""
    from fm_longctx.integrations import deepspeed as plug

    forget()
    integration.register()
    with deepspeed_world() as deepspeed, fsdp_on_cpu() if engine == "fsdp" else nullcontext():
        changes = {}
        if engine == "fsdp":
            changes["fsdp"] = True
        if engine == "zero3":
            plug.install()
            changes["deepspeed"] = {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "flashmask": {"context_parallel_size": 2},
            }
        try:
            trainer = LongTrainer(
                make(family, integration.NAME),
                arguments(folder, **changes),
                train_dataset=FEATURES,
                eval_dataset=FEATURES,
                data_collator=DataCollatorForFlashMask(
                    context_parallel_size=2, sliding_window=None if family == "llama" else WINDOW
                ),
            )
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"] if engine != "zero3" else None
            logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            model = trainer.accelerator.unwrap_model(trainer.model)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the evaluation left the last layers whole
            sharded = [isinstance(p, DTensor) for p in model.parameters()]
            assert all(sharded) if engine == "fsdp" else not any(sharded)
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                after = {n: p.detach().clone() for n, p in model.named_parameters()}
            return logged, evaluated, {n: p.full_tensor() if engine == "fsdp" else p for n, p in after.items()}
        finally:
            forget()


def expected(family):
    """One process, eager attention, every sequence alone, in the order that the sampler gives."""
    model = make(family, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    # Eight features, four a step: one epoch.
    order = list(DistributedSampler(FEATURES, num_replicas=1, rank=0, shuffle=True, seed=3))
    for step in range(2):
        features = [FEATURES[i] for i in order[4 * step : 4 * step + 4]]
        optimizer.zero_grad()
        loss = mean_loss(model, features)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        losses.append(loss.item())
    batches = [mean_loss(model, FEATURES[i : i + 2]).item() for i in range(0, 8, 2)]
    return losses, sum(batches) / 4, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family, engine", [("gemma3", "ddp"), ("llama", "fsdp"), ("llama", "zero3")])
def test_trainer_over_two_ranks_equals_one(family, engine, tmp_path):
    losses, loss_after, after = expected(family)
    start = {n: p.detach() for n, p in make(family, "eager").named_parameters()}
    for logged, evaluated, weights in run_ranks(2, trained, str(tmp_path), family, engine, timeout=120):
        assert logged == pytest.approx(losses, rel=1e-3)  # it rounds what it logs
        if evaluated is not None:
            assert evaluated == pytest.approx(loss_after, rel=1e-5)
        assert_trained(weights, after, start)


def assert_trained(got, exact, start):
    """The change of each weight from its start, but for the rounding of the weight itself."""
    for name, weight in exact.items():
        rounding = 2 * torch.finfo(torch.float32).eps * weight.abs().max()
        assert (got[name] - weight).abs().max() <= 3e-5 * (weight - start[name]).abs().max() + rounding, name


def evaluated_first(folder):
    forget()
    integration.register()
    try:
        collator = DataCollatorForFlashMask(context_parallel_size=2)
        data = {"train_dataset": FEATURES, "eval_dataset": FEATURES}
        trainer = LongTrainer(make("llama", integration.NAME), arguments(folder), data_collator=collator, **data)
        trainer.evaluate()
        trainer.train()
    except ValueError as error:
        return str(error)
    finally:
        forget()


def test_a_model_that_was_evaluated_first_is_refused(tmp_path):
    """The Trainer would not wrap it, and gradients would stay each rank's own."""
    for said in run_ranks(2, evaluated_first, str(tmp_path), timeout=120):
        assert "gradients would not be averaged" in said


def refused(folder):
    forget()
    said = []
    integration.register()
    model = make("llama", integration.NAME)
    good = {"context_parallel_size": 2}
    for collator, changes, more in (
        (good, {"average_tokens_across_devices": False}, {}),
        (good, {"label_smoothing_factor": 0.1}, {}),
        (good, {}, {"compute_loss_func": lambda *a, **k: None}),
        ({**good, "context_parallel_rank": 1 - torch.distributed.get_rank()}, {}, {}),
        ({"context_parallel_size": 3}, {}, {}),
        (None, {}, {}),
    ):
        data = None if collator is None else DataCollatorForFlashMask(**collator)
        trainer = LongTrainer(model, arguments(folder, **changes), train_dataset=FEATURES, data_collator=data, **more)
        try:
            trainer.get_train_dataloader()
            said.append("accepted")
        except ValueError as error:
            said.append(str(error))
    forget()
    return said


def test_refuses(tmp_path):
    said = run_ranks(2, refused, str(tmp_path), timeout=120)
    for rank, words in enumerate(said):
        other = 1 - rank
        assert "average_tokens_across_devices=False weighs ranks equally" in words[0]
        assert "label_smoothing_factor shifts labels" in words[1]
        assert "compute_loss_func does not see" in words[2]
        assert f"was made with context_parallel_rank={other}" in words[3]
        assert "context_parallel_size=3 does not divide the 2 ranks" in words[4]
        assert "needs data_collator=DataCollatorForFlashMask" in words[5]
