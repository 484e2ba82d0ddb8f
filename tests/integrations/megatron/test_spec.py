"""Which specs are swapped, how deeply, and which are refused."""

import pytest
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from fm_longctx.integrations.megatron import FlashMaskCoreAttention, use_flashmask


def core_of(layer):
    return layer.submodules.self_attention.submodules.core_attention


@pytest.mark.parametrize("options", [{}, {"multi_latent_attention": True}, {"num_experts": 4}])
def test_local_layers(options):
    spec = gpt_layer_specs.get_gpt_layer_local_spec(**options)
    swapped = use_flashmask(spec, sharding="zigzag", without_mask="causal")
    assert core_of(swapped).module is FlashMaskCoreAttention
    assert core_of(swapped).params == {"sharding": "zigzag", "without_mask": "causal"}
    assert core_of(spec) is DotProductAttention
    # Swapping again changes the options; all else is as it was.
    assert core_of(use_flashmask(swapped)).params == {"sharding": "plan", "without_mask": "raise"}
    assert swapped.submodules.mlp == spec.submodules.mlp


def test_transformer_engine_layers(monkeypatch):
    """TransformerEngine needs a GPU: a class of the same name stands for its attention, mocks for its other modules."""
    stand_in = type("TEDotProductAttention", (), {})
    monkeypatch.setattr(transformer_engine_spec_provider, "TEDotProductAttention", stand_in)
    monkeypatch.setattr(transformer_engine_spec_provider, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(
        gpt_layer_specs, "TESpecProvider", transformer_engine_spec_provider.TESpecProvider, raising=False
    )
    for options in ({}, {"multi_latent_attention": True}):
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**options)
        assert core_of(spec) is stand_in
        assert core_of(use_flashmask(spec)).module is FlashMaskCoreAttention


def test_blocks_and_multi_token_prediction():
    layer = gpt_layer_specs.get_gpt_layer_local_spec()
    block = TransformerBlockSubmodules(layer_specs=[layer, gpt_layer_specs.get_gpt_layer_local_spec(num_experts=2)])
    swapped = use_flashmask(block)
    assert [core_of(x).module for x in swapped.layer_specs] == [FlashMaskCoreAttention] * 2

    mtp = gpt_layer_specs.get_mtp_layer_spec_for_backend(layer, gpt_layer_specs.LocalSpecProvider())
    swapped = use_flashmask(gpt_layer_specs.MultiTokenPredictionBlockSubmodules(layer_specs=[mtp]))
    assert core_of(swapped.layer_specs[0].submodules.transformer_layer).module is FlashMaskCoreAttention


def test_refused_specs():
    layer = gpt_layer_specs.get_gpt_layer_local_spec()
    with pytest.raises(ValueError, match="no self-attention with a core_attention was found in this ModuleSpec"):
        use_flashmask(layer.submodules.mlp)

    sparse = gpt_layer_specs.get_gpt_layer_local_spec()
    sparse.submodules.self_attention.submodules.core_attention = ModuleSpec(module=type("DSAttention", (), {}))
    with pytest.raises(ValueError, match="core_attention=DSAttention is not one that"):
        use_flashmask(sparse)

    crossing = gpt_layer_specs.get_gpt_layer_local_spec()
    crossing.submodules.cross_attention = ModuleSpec(
        module=CrossAttention,
        submodules=CrossAttentionSubmodules(linear_q=None, linear_kv=None, core_attention=DotProductAttention),
    )
    with pytest.raises(ValueError, match="this spec has cross-attention"):
        use_flashmask(crossing)

    with pytest.raises(ValueError, match=r"sharding must be one of \('plan', 'zigzag'\), got 'zig-zag'"):
        use_flashmask(layer, sharding="zig-zag")
    with pytest.raises(ValueError, match="without_mask must be one of"):
        use_flashmask(layer, without_mask=None)
    with pytest.raises(ValueError, match='without_mask="causal" needs sharding="zigzag"'):
        use_flashmask(layer, without_mask="causal")
