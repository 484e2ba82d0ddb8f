"""What an engine cannot do is refused by name; weights go to Megatron's layout and back."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig

from fm_longctx.train import config_load
from fm_longctx.train.config import Config, DataConfig, ParallelConfig, TrainConfig
from fm_longctx.train.engines import megatron_model, megatron_weights, start, tensor_parallel
from tests.distributed import run_ranks
from tests.train.tiny import CONFIG, tiny_model

UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"parallel.zero_stage": 2}, "zero_stage=2 has no meaning for parallel.engine: fsdp"),
        ({"parallel.pipeline": 2}, "pipeline=2 has no meaning for parallel.engine: fsdp. Leave it at 1"),
        ({"parallel.engine": "deepspeed", "parallel.tensor": 2}, "set parallel.engine to fsdp or megatron"),
        ({"parallel.engine": "megatron", "parallel.replicate": 2}, "set parallel.engine to fsdp"),
        (
            {"parallel.engine": "megatron", "parallel.reshard_after_forward": False},
            "reshard_after_forward=False",
        ),
        ({"parallel.engine": "torch"}, "must be one of fsdp, deepspeed, megatron"),
        ({"parallel.ranks": 6, "parallel.tensor": 4}, r"context=1 x parallel\.tensor=4 x parallel\.pipeline=1 do not"),
        ({"parallel.ranks": 6, "parallel.context": 2, "parallel.replicate": 2}, "does not divide the 3 data ranks"),
        (
            {"parallel.engine": "deepspeed", "parallel.zero_stage": 1, "train.precision": "bfloat16"},
            r"Set parallel\.zero_stage to 2 or 3",
        ),
    ],
)
def test_options_of_another_engine(values, message):
    with pytest.raises(ValueError, match=message):
        config_load.build(values)


def hf(kind="llama", **changes):
    return AutoConfig.for_model(kind, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **changes)


@pytest.mark.parametrize(
    "model, parallel, message",
    [
        (hf("gemma"), {"tensor": 2}, "this model is of type gemma"),
        (hf(), {"tensor": 4}, "parallel.tensor=4 does not divide the model's num_key_value_heads=2"),
        (hf("gemma"), {"engine": "megatron"}, "this one is of type gemma"),
        (hf(attention_bias=True), {"engine": "megatron"}, "has no weights for attention_bias"),
        (
            hf(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            {"engine": "megatron"},
            "this model has yarn",
        ),
        (hf(), {"engine": "megatron", "tensor": 4}, "does not divide the model's num_key_value_heads=2"),
        (
            hf(num_hidden_layers=3),
            {"engine": "megatron", "pipeline": 2},
            "model's num_hidden_layers=3",
        ),
        (hf(), {"engine": "megatron", "pipeline": 2, "context": 3}, "does not divide data.sequence_length=64"),
    ],
)
def test_models_that_an_engine_cannot_hold(model, parallel, message):
    config = Config(data=DataConfig(sequence_length=64), parallel=ParallelConfig(**parallel))
    with pytest.raises(ValueError, match=message):
        if config.parallel.engine == "megatron":
            megatron_model.check_model(model, config)
        else:
            tensor_parallel.check_tensor_parallel(model, config.parallel.tensor)


def without_cuda():
    with pytest.raises(ValueError) as error:
        start(Config(parallel=ParallelConfig(engine="megatron"), train=TrainConfig(device="cpu")))
    return str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_megatron_without_cuda():
    (said,) = run_ranks(1, without_cuda)
    assert said.startswith("parallel.engine: megatron needs a CUDA device, and this rank has cpu")


@pytest.mark.parametrize("size", [1, 2])
def test_weights_go_to_megatron_and_back(size):
    whole = {name: p.detach() for name, p in tiny_model(UNTIED).causal_lm.named_parameters()}
    found = {}
    for name in (
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "output_layer.weight",
    ):
        e = megatron_weights.entry(name, first_layer=1, tied=False)
        parts = [megatron_weights.to_megatron(e, whole.get, groups=2, rank=r, size=size) for r in range(size)]
        found |= zip(e.names, megatron_weights.from_megatron(e, parts, groups=2, queries=4), strict=True)
    assert len(found) == 10
    assert all(torch.equal(weight, whole[name]) for name, weight in found.items())
    with pytest.raises(ValueError, match=r"Megatron's parameter decoder\.layers\.0\.mlp\.router has no counterpart"):
        megatron_weights.entry("decoder.layers.0.mlp.router", first_layer=0, tied=False)
