"""The estimator against what lives: bytes kept of a layer in each mode, the peak of a step, parameters, FLOPs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fm_longctx import FlashMask
from fm_longctx.train.config import ModelConfig, TrainConfig
from fm_longctx.train.estimate import Setup, Shape, forward_flops, layer_kept, memory
from fm_longctx.train.memory import prepare_layers
from fm_longctx.train.model import build, huggingface_config
from tests.train.live_bytes import LiveBytes
from tests.train.tiny import tiny_model

T = 512
WIDE = ModelConfig(
    hidden_size=32,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
MODES = [
    {},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": "full", "mlp_chunk": 64},
    {"mlp_chunk": 64},
]


def step(config, dtype, train, backward=True):
    """(bytes after the forward, peak of forward and backward) of a step on the CPU; weights do not count."""
    model = tiny_model(config, dtype=dtype)
    model.loss_chunk = 32
    prepare_layers(model, TrainConfig(**train))
    tokens = torch.randint(258, (1, T))
    mask = FlashMask.from_lengths([T])
    # What the mask makes for all layers is not a layer's.
    model(tokens, tokens, torch.arange(T)[None], flashmask=mask)
    with LiveBytes() as live:
        loss = model(tokens, tokens, torch.arange(T)[None], flashmask=mask)
        kept = live.now()
        if backward:
            loss.backward()
    return kept, live.peak


def setup(dtype, train):
    return Setup(
        tokens=T,
        precision="float32" if dtype == torch.float32 else "bfloat16",
        checkpointing=train.get("activation_checkpointing", "none"),
        mlp_chunk=train.get("mlp_chunk"),
        loss_chunk=32,
    )


def shape_of(config):
    return Shape.of(huggingface_config(config, max_length=T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_a_layer_keeps(kind, dtype):
    config = replace(WIDE, kind=kind)
    # What differs of Qwen3 differs where everything is kept.
    for train in MODES if kind == "llama" else MODES[:1]:
        several, one = (step(replace(config, num_hidden_layers=n), dtype, train, False)[0] for n in (3, 1))
        assert layer_kept(shape_of(config), setup(dtype, train)) == pytest.approx((several - one) / 2, rel=0.01), train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_step(dtype):
    for train in MODES:
        peak = step(WIDE, dtype, train)[1]
        found = memory(shape_of(WIDE), setup(dtype, train))
        # There is no sharding here: no master weights and moments, nothing gathered, gradients once.
        outside = found.parameters + found.optimizer + found.gathered + found.unreduced
        assert found.peak - outside == pytest.approx(peak, rel=0.15), (train, found)


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
    assert forward_flops(shape, T, 0) == counter.get_total_flops()
    assert forward_flops(shape, T, 10) - forward_flops(shape, T, 0) == 4 * 16 * 4 * 4 * 10
