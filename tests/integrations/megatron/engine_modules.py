"""Stands for TransformerEngine, which needs a GPU: Megatron's own modules in the shapes that its spec asks for."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from megatron.core.extensions import transformer_engine_spec_provider as provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class NormAndLinear(ColumnParallelLinear):
    """TELayerNormColumnParallelLinear: the norm before a linear is part of it."""

    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size))
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x, *arguments, **options):
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        x = torch.nn.functional.layer_norm(x, weight.shape, weight, bias, self.config.layernorm_epsilon)
        return super().forward(x, *arguments, **options)


class TEDotProductAttention:
    """Known by its name alone; a model that still builds it was not swapped."""

    def __init__(self, **options):
        raise AssertionError("TransformerEngine's attention is still in the spec")


# What a weight is called where the norm is a module of its own, as in Megatron's local spec.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@contextmanager
def engine_modules():
    """get_gpt_layer_with_transformer_engine_spec() gives a spec of these."""
    modules = {
        "TELayerNormColumnParallelLinear": NormAndLinear,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TEDotProductAttention": TEDotProductAttention,
        "is_te_min_version": lambda version: True,
    }
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(mock.patch.object(provider, name, module))
        stack.enter_context(mock.patch.object(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, create=True))
        yield
