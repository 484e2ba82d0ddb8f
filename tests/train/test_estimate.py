"""The estimator against what lives: bytes kept of a layer in each mode, the peak of a step, parameters, FLOPs."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fm_longctx import FlashMask
from fm_longctx.train import memory as train_memory
from fm_longctx.train.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from fm_longctx.train.engines import make_engine, optimizer, start
from fm_longctx.train.estimate import Setup, Shape, flop_count, step_flops
from fm_longctx.train.estimate_memory import layer_kept, memory, mlp_extra
from fm_longctx.train.flops import FlopCount
from fm_longctx.train.memory import prepare_layers
from fm_longctx.train.model import build, huggingface_config
from fm_longctx.train.tasks.models import build_model
from tests.distributed import run_ranks
from tests.train.live_bytes import LiveBytes
from tests.train.tiny import tiny_model

T = 512
# Weights and activations weigh as those of the 8B at 32K and 128K tokens do.
WIDE = ModelConfig(
    hidden_size=64,
    intermediate_size=224,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)
MODES = [
    {},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "selective", "mlp_kept": 2},
    {"activation_checkpointing": "full", "mlp_chunk": 64},
    {"mlp_chunk": 64},
]


def batch():
    tokens = torch.randint(258, (1, T))
    return (tokens, tokens, torch.arange(T)[None]), FlashMask.from_lengths([T])


def kept(config, dtype, train):
    """Bytes after the forward on the CPU; weights do not count."""
    model = tiny_model(config, dtype=dtype)
    model.loss_chunk = 32
    # Cut into forward and backward as Inductor cuts it, and run without a compiler.
    partitioned = partial(torch.compile, backend="aot_eager_decomp_partition")
    with mock.patch.object(torch, "compile", partitioned):
        prepare_layers(model, TrainConfig(**train))
    given, mask = batch()
    # What the mask makes for all layers is not a layer's.
    model(*given, flashmask=mask)
    if train.get("compile"):
        return saved(model, given, mask)
    with LiveBytes() as live:
        loss = model(*given, flashmask=mask)
        after = live.now()
        del loss
    return after


def saved(model, given, mask):
    """Bytes that autograd saves: compiled code does not run where operations are counted."""
    storages = {p.untyped_storage().data_ptr(): 0 for p in (*model.parameters(), mask.starts, mask.ends)}
    held = []

    def pack(tensor):
        # Held, so that no other takes its place.
        held.append(tensor)
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    # A kept MLP has hooks of its own.
    with saved_tensors_hooks(pack, lambda tensor: tensor), mock.patch.object(train_memory, "_as_it_is", pack):
        model(*given, flashmask=mask)
    return sum(storages.values())


def setup(precision, train):
    return Setup(
        tokens=T,
        precision=precision,
        checkpointing=train.get("activation_checkpointing", "none"),
        mlp_chunk=train.get("mlp_chunk"),
        mlp_kept=train.get("mlp_kept", 0),
        compile=train.get("compile", False),
        loss_chunk=32,
    )


def shape_of(config):
    return Shape.of(huggingface_config(config, max_length=T))


@pytest.mark.parametrize("kind, precision", [("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "bfloat16")])
def test_what_a_layer_keeps(kind, precision):
    config = replace(WIDE, kind=kind)
    # What differs of Qwen3, and of float32, differs where everything is kept.
    most = MODES if (kind, precision) == ("llama", "bfloat16") else MODES[:1]
    for train in [*most, {"compile": True}]:
        if "mlp_kept" in train:
            continue
        several, one = (kept(replace(config, num_hidden_layers=n), getattr(torch, precision), train) for n in (3, 1))
        of_one = layer_kept(shape_of(config), setup(precision, train))
        assert of_one == pytest.approx((several - one) / 2, rel=0.01), train


def test_the_peak_of_a_step():
    """Of the engine: weights, gradients, moments, what is gathered, activations and all. Its one rank shards, but for
    bfloat16 weights."""
    modes = [("float32", MODES[0]), *(("bfloat16", MODES[i]) for i in (0, 2, 3, 4))]
    for precision, train in [*modes, ("bfloat16_stochastic", MODES[4])]:
        options = TrainConfig(device="cpu", precision=precision, loss_chunk=32, **train)
        config = Config(model=WIDE, data=DataConfig(sequence_length=T), train=options)
        (peak,) = run_ranks(1, peak_of_a_step, config)
        found = memory(shape_of(WIDE), setup(precision, train))
        assert found.peak == pytest.approx(peak, rel=0.05), (train, found)


def test_adapters_and_a_reference():
    """Frozen weights have no gradient and no moments; a copy is the weights once more."""
    given = TrainConfig(device="cpu", precision="bfloat16", loss_chunk=32, activation_checkpointing="full")
    config = Config(model=WIDE, data=DataConfig(sequence_length=T), train=given, lora=LoraConfig(r=4))
    trained = sum(p.numel() for p in build_model(config).parameters() if p.requires_grad)
    (peak,) = run_ranks(1, peak_of_a_step, config)
    shape = shape_of(WIDE)
    adapters = replace(setup("bfloat16", {"activation_checkpointing": "full"}), trained=trained)
    found = memory(shape, adapters)
    assert found.parameters == 2 * shape.parameters + 4 * trained
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    assert found.peak == pytest.approx(peak, rel=0.1)
    compared = memory(shape, replace(adapters, reference="copy"))
    assert compared.peak - found.peak == compared.reference == 2 * shape.parameters
    assert memory(shape, replace(adapters, reference="same")) == found


def peak_of_a_step(config):
    # torchao may not be there; its moments and its updates are as large.
    nearest = mock.patch.object(optimizer, "stochastic_adamw", lambda groups, **rates: torch.optim.AdamW(groups))
    with nearest, LiveBytes() as live:
        engine = make_engine(config, start(config))
        for _ in range(2):
            live.peak = 0
            (tokens, labels, positions), mask = batch()
            (engine.model(tokens, labels, positions, flashmask=mask) / T).backward()
            torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 1.0)
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        return live.peak


def test_a_kept_mlp():
    """What it adds to a layer that is a checkpoint, compiled or not."""
    base = {"activation_checkpointing": "selective"}
    for compiled in ({}, {"compile": True}):
        without, with_mlp = (kept(WIDE, torch.bfloat16, base | compiled | more) for more in ({}, {"mlp_kept": 4}))
        extra = mlp_extra(shape_of(WIDE), setup("bfloat16", base | compiled))
        assert (with_mlp - without) / 4 == pytest.approx(extra, rel=0.01)


def test_parameters_of_the_shapes():
    for kind, tied in (("llama", True), ("llama", False), ("qwen3", False)):
        config = replace(WIDE, kind=kind, tie_word_embeddings=tied)
        model = build(config, max_length=T)
        assert shape_of(config).parameters == sum(p.numel() for p in model.parameters())


def test_flops_of_the_matrices():
    """torch's own counter; attention is apart, in an op of its own that it does not know."""
    model = tiny_model(WIDE)
    tokens = torch.randint(258, (1, T))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        positions = torch.arange(T)[None]
        model.causal_lm(tokens, position_ids=positions, use_cache=False, flashmask=FlashMask.from_lengths([T]))
    shape = shape_of(WIDE)
    count = flop_count(shape)
    assert count == FlopCount.of(model.causal_lm, model.causal_lm.config)
    assert count.forward(T, {None: 0}) == counter.get_total_flops()
    assert step_flops(shape, T, 10) - step_flops(shape, T, 0) == 3 * 4 * 16 * 4 * 4 * 10
