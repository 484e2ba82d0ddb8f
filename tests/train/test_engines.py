"""Every engine and layout gives one loss curve: that of plain transformers, dense masks and torch's AdamW."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fm_longctx.data import IGNORED, Loader
from fm_longctx.train import config_load, loop
from fm_longctx.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from fm_longctx.train.engines import make_engine, start
from fm_longctx.train.start import prepare
from fm_longctx.train.step import train_step
from tests.distributed import run_ranks
from tests.train.tiny import CONFIG, MadeUpStream, tiny_model

STEPS = 3
# Two sequences a step: 60, 32, 3, 61, 63 and 59 labels.
LENGTHS = [[60, 4], [1] * 31 + [33], [2, 2, 2, *[1] * 58], [40, 22, 2], [64], [10, 20, 3, 30, 1]]
LLAMA = dataclasses.replace(CONFIG, tie_word_embeddings=False)
# An epsilon like the gradients: no step is a mere sign, which rounding would decide.
OPTIMIZER = OptimizerConfig(lr=0.01, eps=0.01, clip_norm=0.5)

# Losses, gradient norms and weights of all agree to this.
TOLERANCE = 2e-5

# On two ranks.
OF_LLAMA = {
    "fsdp cp2": {"context": 2},
    "fsdp hsdp": {"replicate": 2},
    "fsdp tp2": {"tensor": 2},
    "deepspeed 1": {"engine": "deepspeed", "context": 2, "zero_stage": 1},
    "deepspeed 2": {"engine": "deepspeed", "context": 2, "zero_stage": 2},
    "deepspeed 3": {"engine": "deepspeed", "context": 2, "zero_stage": 3},
    "megatron tp2": {"engine": "megatron", "tensor": 2},
    "megatron pp2": {"engine": "megatron", "pipeline": 2},
    "megatron cp2": {"engine": "megatron", "context": 2, "distributed_optimizer": True},
}
# On four.
PRODUCTS = {
    "fsdp tp2 cp2": {"tensor": 2, "context": 2},
    "megatron tp2 cp2": {"engine": "megatron", "tensor": 2, "context": 2},
    "megatron pp2 cp2": {"engine": "megatron", "pipeline": 2, "context": 2, "head_parallel": 2},
}
# Its queries and keys have norms; the embedding is the output projection.
OF_QWEN3 = {
    "fsdp tp2": {"tensor": 2},
    "deepspeed 3": {"engine": "deepspeed", "zero_stage": 3},
    "megatron tp2": {"engine": "megatron", "tensor": 2},
    "megatron pp2": {"engine": "megatron", "pipeline": 2},
}
IN_BFLOAT16 = {
    "fsdp cp2": {"context": 2},
    "fsdp tp2": {"tensor": 2},
    "deepspeed 2": {"engine": "deepspeed", "context": 2, "zero_stage": 2},
    "deepspeed 3": {"engine": "deepspeed", "context": 2, "zero_stage": 3},
    "megatron tp2": {"engine": "megatron", "tensor": 2},
}


def config_of(model, parallel, precision="float32"):
    data = ParallelConfig(**parallel).data_ranks(dist.get_world_size())
    chunk = {} if parallel.get("context", 1) == 1 else {"chunk_size": 8}
    return Config(
        model=model,
        data=DataConfig(sequence_length=64),
        parallel=ParallelConfig(**parallel, **chunk),
        optimizer=OPTIMIZER,
        train=TrainConfig(device="cpu", gradient_accumulation=2 // data, loss_chunk=7, precision=precision),
    )


@contextlib.contextmanager
def library(engine):
    """What an engine's library needs to run in a rank of the pool, on a CPU."""
    from tests.integrations.deepspeed_world import deepspeed_world
    from tests.integrations.megatron.cpu import megatron_on_cpu

    with (
        {"fsdp": contextlib.nullcontext, "deepspeed": deepspeed_world, "megatron": megatron_on_cpu}[engine](),
        mock.patch.dict(os.environ),
    ):
        # As in a job of one rank without torchrun; DeepSpeed asks for it.
        os.environ.pop("LOCAL_RANK")
        yield


def go_on(engine, config, folder):
    """Another engine, with what this one saved; or what the last of its kind did, on ranks laid out otherwise."""
    place = Path(folder) / f"{engine.name}{config.parallel.zero_stage or ''}"
    dist.barrier()
    if not place.exists():
        dist.barrier()
        if dist.get_rank() == 0:
            place.mkdir()
        dist.barrier()
        dcp.save(engine.state_dict(), checkpoint_id=place)
        engine.save(place)
    other = make_engine(config, engine.world)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=place)
    other.load_state_dict(state)
    other.load(place)
    return other


def curve(model, parallel, folder, precision="float32"):
    """On one rank: (loss, gradient norm, labels) of each step, and on rank 0 the weights after."""
    config = config_of(model, parallel, precision)
    with library(config.parallel.engine):
        world = start(config)
        engine = make_engine(config, world)
        loader = Loader(
            MadeUpStream(LENGTHS),
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
            cp_rank=world.cp_rank,
            cp_size=world.cp_size,
            plan_options=config.parallel.plan_options,
        )
        if precision == "bfloat16" and engine.name != "megatron":
            # The masters, which are not rounded.
            exact = dict(tiny_model(model).causal_lm.named_parameters())
            rounded = {name for name, weight in engine.weights() if weight.numel() and not weight.equal(exact[name])}
            assert not rounded
        history = []
        for step in range(STEPS):
            batches = [next(loader) for _ in range(config.train.gradient_accumulation)]
            engine.set_lr(0.01 / (step + 1))
            if step == 1:
                evaluated = torch.zeros((), dtype=torch.float64)
                for batch in batches:
                    evaluated += engine.token_losses(batch).double().sum().cpu()
                dist.all_reduce(evaluated)
                # As if these had not been.
                engine.gradients(batches)
                engine.discard()
            result = train_step(engine, batches)
            history.append((result.loss, result.grad_norm, result.labels))
            if step == 1:
                # Evaluation sees what training does, on every rank that holds the batch.
                assert float(evaluated) / world.copies == pytest.approx(result.loss * result.labels, rel=1e-4)
            if step == 1 and folder is not None and not config.parallel.distributed_optimizer:
                engine = go_on(engine, config, folder)
        loader.close()
        return history, dict(engine.weights()) if world.rank == 0 else len(list(engine.weights()))


def curves(model, cases, folder, precision="float32"):
    warnings.filterwarnings("ignore")
    # Megatron writes checkpoints from processes of its own, which a rank of the pool may not have.
    multiprocessing.current_process()._config["daemon"] = False
    return {name: curve(model, parallel, folder, precision) for name, parallel in cases.items()}


def expected(config):
    """One process, plain transformers, whole logits, dense masks from the words, torch's own AdamW and clipping."""
    ours = tiny_model(config)
    plain = AutoModelForCausalLM.from_config(ours.causal_lm.config, attn_implementation="sdpa")
    plain.load_state_dict(ours.causal_lm.state_dict())
    matrices, others = [[p for p in plain.parameters() if (p.ndim == 2) == want] for want in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=OPTIMIZER.eps,
    )
    history = []
    for step in range(STEPS):
        total, labels = 0.0, 0
        for index in (2 * step, 2 * step + 1):
            packed = MadeUpStream(LENGTHS).sequence(index)
            owner = [d for d, n in enumerate(LENGTHS[index]) for _ in range(n)]
            visible = torch.tensor([[r >= c and owner[r] == owner[c] for c in range(64)] for r in range(64)])
            logits = plain(
                packed.tokens[None],
                attention_mask=visible[None, None],
                position_ids=packed.positions[None],
                use_cache=False,
            ).logits
            total = total + F.cross_entropy(logits[0], packed.labels, reduction="sum", ignore_index=IGNORED)
            labels += sum(n - 1 for n in LENGTHS[index])
        (total / labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), OPTIMIZER.clip_norm)
        assert norm > OPTIMIZER.clip_norm  # or clipping is not tested
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        history.append((float(total.detach()) / labels, float(norm), labels))
    return history, {name: p.detach() for name, p in plain.named_parameters()}


def check(got, want, name):
    history, weights = got
    for mine, exact in zip(history, want[0], strict=True):
        assert mine == pytest.approx(exact, rel=TOLERANCE), name
    assert weights.keys() == want[1].keys(), name
    for key, exact in want[1].items():
        assert (weights[key] - exact).abs().max() <= TOLERANCE * exact.abs().max(), f"{name}: {key}"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A folder with a model of random weights, norms too."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(3)
    shape = {name: getattr(CONFIG, name) for name in SHARED}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, max_position_embeddings=64, tie_word_embeddings=True))
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder))


SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "initializer_range",
)


def test_the_same_curve_whoever_trains(qwen3, tmp_path):
    runs = [
        (LLAMA, 1, {"fsdp": {}}, None),
        (LLAMA, 2, OF_LLAMA, str(tmp_path)),
        (LLAMA, 4, PRODUCTS, None),
        (qwen3, 2, OF_QWEN3, None),
    ]
    exact = {model: expected(model) for model in (LLAMA, qwen3)}
    for model, ranks, cases, folder in runs:
        want = exact[model]
        first, *rest = run_ranks(ranks, curves, model, cases, folder, timeout=240)
        for name, got in first.items():
            check(got, want, name)
            # Every rank knows the result.
            assert all(other[name][0] == got[0] for other in rest), name


def test_the_same_curve_in_bfloat16():
    """Close to float32, and not float32."""
    history, weights = expected(LLAMA)
    for name, (mine, after) in run_ranks(2, curves, LLAMA, IN_BFLOAT16, None, "bfloat16", timeout=240)[0].items():
        for got, exact in zip(mine, history, strict=True):
            assert got == pytest.approx(exact, rel=5e-3), name
            assert got[0] != pytest.approx(exact[0], rel=TOLERANCE), name
        for key, exact in weights.items():
            assert (after[key].float() - exact).abs().max() <= 0.01 * exact.abs().max(), f"{name}: {key}"


def megatron_logits(model, tokens, positions):
    from fm_longctx import ContextParallel, FlashMask, ShardPlan
    from fm_longctx.integrations.megatron import FlashMaskParams

    warnings.filterwarnings("ignore")
    config = config_of(model, {"engine": "megatron"})
    with library("megatron"):
        engine = make_engine(config, start(config))
        mask = FlashMask.from_position_ids(positions)
        context = ContextParallel(None, ShardPlan.build(mask, 1), mask)
        params = FlashMaskParams(context, position_ids=positions)
        return engine.model(tokens, positions, None, packed_seq_params=params).detach()


def test_megatron_gives_the_logits_of_hugging_face(qwen3):
    packed = MadeUpStream([[40, 24]]).sequence(0)
    visible = torch.tensor([[r >= c and (r < 40) == (c < 40) for c in range(64)] for r in range(64)])
    plain = AutoModelForCausalLM.from_pretrained(qwen3.path, attn_implementation="sdpa")
    want = plain(
        packed.tokens[None], attention_mask=visible[None, None], position_ids=packed.positions[None], use_cache=False
    ).logits.detach()
    (got,) = run_ranks(1, megatron_logits, qwen3, packed.tokens[None], packed.positions[None], timeout=120)
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def launched(values):
    config = config_load.build(values)
    with library(config.parallel.engine):
        loop.run(config, prepare(config, 2))


def test_the_launcher_goes_on_with_deepspeed(tmp_path):
    """Files of the engine's own beside those of the launcher's."""
    values = {
        "model.hidden_size": 32,
        "model.intermediate_size": 48,
        "model.num_hidden_layers": 1,
        "model.head_dim": 8,
        "data.sequence_length": 128,
        "data.max_bytes": 300,
        "parallel.engine": "deepspeed",
        "parallel.context": 2,
        "train.device": "cpu",
        "train.steps": 4,
        "train.if_exists": "resume",
    }
    first, second = (values | {"train.folder": str(tmp_path / name)} for name in ("first", "second"))
    run_ranks(2, launched, first | {"checkpoint.every": 2}, timeout=120)
    run_ranks(2, launched, second | {"checkpoint.load": f"{tmp_path}/first/checkpoints/step_00000002"}, timeout=120)
    whole, rest = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    )
    assert [line["step"] for line in rest] == [3, 4]
    assert [line["loss"] for line in rest] == [line["loss"] for line in whole[2:]]
