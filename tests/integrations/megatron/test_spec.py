"""Which specs are swapped, how deeply, and which are refused."""

import ast
import inspect
from pathlib import Path

import megatron.core
import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from fm_longctx.integrations.megatron import FlashMaskCoreAttention, use_flashmask
from tests.integrations.megatron.engine_modules import TEDotProductAttention, engine_modules


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


def test_transformer_engine_layers():
    """TransformerEngine needs a GPU: modules of Megatron's stand for its own. test_training.py trains such a model."""
    with engine_modules():
        for options in ({}, {"multi_latent_attention": True}):
            spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**options)
            assert core_of(spec) is TEDotProductAttention
            assert core_of(use_flashmask(spec)).module is FlashMaskCoreAttention


def test_it_takes_what_transformer_engines_attention_takes():
    """Megatron's wrapper cannot be imported without TransformerEngine, so its source is read."""
    source = ast.parse(
        Path(megatron.core.__file__).with_name("extensions").joinpath("transformer_engine.py").read_text()
    )
    (wrapper,) = (
        node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    )
    methods = {node.name: node.args for node in wrapper.body if isinstance(node, ast.FunctionDef)}
    # How many parts of the keys inference attends to at once; nothing in Megatron passes it.
    optional = {"num_splits"}
    for name, mine in (("__init__", FlashMaskCoreAttention.__init__), ("forward", FlashMaskCoreAttention.forward)):
        theirs = [argument.arg for argument in methods[name].args]
        assert set(theirs) - optional <= set(inspect.signature(mine).parameters), name
        assert len(theirs) > 7


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
