"""What a model's layers keep for the backward: everything, their inputs, or attention's results too; here or there.

docs/memory.md says what each choice saves and costs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fm_longctx.train.chunked_mlp import ChunkedMLP
from fm_longctx.train.config import TrainConfig
from fm_longctx.train.kept_attention import KeptAttention
from fm_longctx.train.model import LanguageModel
from fm_longctx.train.offload import Offload


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Of the master weights, the gradients that they are moved by, and Adam's moments."""
    return torch.bfloat16 if config.precision == "bfloat16_stochastic" else torch.float32


def prepare_layers(model: LanguageModel, config: TrainConfig) -> None:
    """Give every layer what the config says of `compile`, `mlp_chunk`, `mlp_kept` and `activation_...`.

    Works on the meta device, before sharding: `forward` is replaced, not the call around it, so that the sharding's
    hooks stay outside and run once. A layer's arguments, the mask among them, reach the recomputation as they were.

    Raises:
        ValueError: `mlp_chunk` or `mlp_kept` for layers without an `mlp`; `mlp_chunk` with one that is split over
            tensor ranks; `mlp_kept` above the number of layers.
    """
    if config.compile:
        _compile_parts(model)
    if config.mlp_kept > len(model.layers):
        raise ValueError(
            f"train.mlp_kept={config.mlp_kept} is a number of layers, and the model has {len(model.layers)}. Set it to "
            "at most that."
        )
    for layer in model.layers[len(model.layers) - config.mlp_kept :]:
        mlp = _mlp(layer, f"train.mlp_kept={config.mlp_kept}", "0")
        _replace(mlp, partial(_kept, mlp.forward))
    if config.mlp_chunk is not None:
        for layer in model.layers:
            mlp = _mlp(layer, f"train.mlp_chunk={config.mlp_chunk}", "null")
            if any(isinstance(parameter, DTensor) for parameter in mlp.parameters()):
                raise ValueError(
                    f"train.mlp_chunk={config.mlp_chunk} does not go with tensor parallelism, under which each rank "
                    "has a part of the MLP's inside already. Set train.mlp_chunk to null."
                )
            _replace(mlp, ChunkedMLP(mlp, config.mlp_chunk))
    if config.activation_checkpointing == "none":
        return
    offload = Offload() if config.activation_offload else None
    selective = config.activation_checkpointing == "selective"
    for layer in model.layers:
        _replace(layer, partial(_checkpointed, layer.forward, selective, offload))
    # The last norm works in float32 and would keep that of all tokens.
    norm = getattr(model.causal_lm.base_model, "norm", None)
    if norm is not None:
        _replace(norm, partial(_checkpointed, norm.forward, False, None))


def _mlp(layer: nn.Module, option: str, otherwise: str) -> nn.Module:
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise ValueError(
            f"{option} needs layers with an mlp, which {type(layer).__name__} does not have. Set it to {otherwise}."
        )
    return mlp


def _compile_parts(model: LanguageModel) -> None:
    """Compile norms, MLPs and what surrounds attention: many small passes over all tokens become few.

    Attention itself stays as it is: the compiler leaves it out. Each part keeps its class and its parameters' names.
    Those of all layers share their compiled code.
    """
    _leave_attention_out(model.causal_lm)
    for layer in model.layers:
        for name, part in layer.named_children():
            if name in ("mlp", "self_attn") or name.endswith("norm"):
                _replace(part, torch.compile(part.forward))
    norm = getattr(model.causal_lm.base_model, "norm", None)
    if norm is not None:
        _replace(norm, torch.compile(norm.forward))


def _leave_attention_out(causal_lm: Any) -> None:
    """Make the compiler end its graph before the model's attention function, and begin another after it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = causal_lm.config._attn_implementation
    name = f"{plain}_left_out"
    AttentionInterface.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[plain]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    causal_lm.set_attn_implementation(name)


def _kept(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Inside a checkpoint, keep what the backward of this part needs. A recomputation ends before it."""
    with saved_tensors_hooks(_as_it_is, _as_it_is):
        return forward(*args, **kwargs)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _checkpointed(
    forward: Callable[..., Any], selective: bool, offload: Offload | None, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The layer, whose `hidden` is kept (its other arguments are shared by all layers) and whose rest is recomputed."""
    group = None if offload is None else offload.group()
    if selective:
        kwargs["once"] = KeptAttention(group)
    with nullcontext() if group is None else group.hooks():
        # The input is saved under the outer hooks; the layer runs under the checkpoint's own.
        return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)
