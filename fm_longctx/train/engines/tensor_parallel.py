"""Tensor parallelism for the fsdp engine: heads, MLP and vocabulary split over neighbouring ranks, through DTensor.

Every parameter becomes a DTensor over the tensor ranks before FSDP shards it further, also those that each rank keeps
whole, so that gradient norms, optimizer and checkpoints meet one kind. Between the layers tensor ranks hold the same
hidden states. Attention sees its own heads only, as plain tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from fm_longctx.train.model import LanguageModel

# Model types of transformers whose layers have the modules named in `_layer_plan`, and no others with parameters.
SHAPES = ("llama", "qwen3")


def check_tensor_parallel(hf_config: Any, size: int) -> None:
    """Raise a ValueError unless such a model can be split over so many tensor ranks."""
    if hf_config.model_type not in SHAPES:
        raise ValueError(
            f"parallel.tensor={size} with parallel.engine: fsdp knows the layers of {' and '.join(SHAPES)}, and this "
            f"model is of type {hf_config.model_type}. Set parallel.tensor to 1."
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(hf_config, name) % size:
            raise ValueError(
                f"parallel.tensor={size} does not divide the model's {name}={getattr(hf_config, name)}. Set it to a "
                "divisor, or to 1."
            )


def split(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split the model over the ranks of a 1-D mesh. On the meta device, before FSDP shards it and it gets weights."""
    causal_lm = model.causal_lm
    check_tensor_parallel(causal_lm.config, mesh.size())
    tied = causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight
    parallelize_module(
        causal_lm,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "model.norm": _Whole(),
            # Never called: the loss takes its weight, and splits the vocabulary itself.
            "lm_head": ColwiseParallel(),
        },
    )
    if tied:
        causal_lm.tie_weights()
    for layer in model.layers:
        plan = {name: style for name, style in _layer_plan().items() if _has(layer, name)}
        parallelize_module(layer, mesh, plan)
    plain = [name for name, p in causal_lm.named_parameters() if not isinstance(p, DTensor)]
    if plain:
        raise ValueError(
            f"parallel.tensor={mesh.size()} does not know how to split {len(plain)} of this model's parameters: "
            f"{plain[:2]}, ... Set parallel.tensor to 1, or train without adapters."
        )


def _layer_plan() -> dict[str, ParallelStyle]:
    # One DTensor for several projections: its gradient is summed over the ranks once for all of them.
    hidden: dict[str, Placement] = {"hidden_states": Replicate()}
    return {
        "input_layernorm": _Whole(),
        "self_attn": PrepareModuleInput(input_kwarg_layouts=hidden, desired_input_kwarg_layouts=hidden),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        # [B, T, heads, D]: each rank has some of the heads.
        "self_attn.q_norm": _Whole(Shard(2)),
        "self_attn.k_norm": _Whole(Shard(2)),
        "self_attn.o_proj": RowwiseParallel(),
        "post_attention_layernorm": _Whole(),
        "mlp": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }


class _Whole(ParallelStyle):
    """A module whose parameters every rank keeps whole, for local inputs of this placement and outputs like them.

    Where ranks have different inputs (heads), the parameters' gradients are summed over them.
    """

    def __init__(self, placement: Placement | None = None) -> None:
        super().__init__()
        self.placement = placement or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placement = self.placement

        def to_dtensor(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            first: Tensor = inputs[0]
            return (DTensor.from_local(first, mesh, (placement,), run_check=False), *inputs[1:])

        def to_local(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, to_dtensor, to_local)


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True
