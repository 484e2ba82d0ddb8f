"""The model: a Hugging Face causal language model with our attention, and the loss over its hidden states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fm_longctx.integrations import transformers as integration
from fm_longctx.train.config import ModelConfig
from fm_longctx.train.loss import chunked_cross_entropy


class LanguageModel(nn.Module):
    """A causal language model that returns the sum of its token losses and never all its logits.

    The loss is inside the module so that, sharded, the output projection is gathered where the loss needs it.

    Args:
        causal_lm: with `base_model`, and an output projection without bias.
        loss_chunk: tokens whose logits exist at once.
    """

    def __init__(self, causal_lm: Any, *, loss_chunk: int = 1024) -> None:
        super().__init__()
        if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
            raise ValueError("the model's output projection has a bias, which the chunked loss does not support.")
        self.causal_lm, self.loss_chunk = causal_lm, loss_chunk

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers: nn.ModuleList = self.causal_lm.base_model.layers
        return layers

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        read: Callable[[Any, Tensor], Tensor] | None = None,
        **mask: Any,
    ) -> Tensor:
        """Sum of the losses, a float32 scalar; or what `read` makes of the hidden states.

        Args:
            tokens, labels, positions: int64 `[B, T]`; labels are shifted already, -100 where nothing is predicted.
            read: called with the Hugging Face model, whose parameters are whole here, and hidden states `[B, T, C]`.
            mask: `flashmask=` or `context=`, as in `fm_longctx.integrations.transformers`.
        """
        hidden = self.causal_lm.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False, **mask
        ).last_hidden_state
        if read is not None:
            return read(self.causal_lm, hidden)
        weight = self.causal_lm.get_output_embeddings().weight
        return chunked_cross_entropy(hidden, weight, labels, chunk=self.loss_chunk)


def build(
    config: ModelConfig, *, max_length: int, loss_chunk: int = 1024, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The model on the meta device: shapes without storage. `materialize` gives it weights.

    Args:
        max_length: the longest document it will see; goes into the Hugging Face config.
        dtype: of the parameters.

    Raises:
        ValueError: transformers is missing, or `config.path` is no folder of a causal language model.
    """
    integration.register()
    from transformers import AutoModelForCausalLM

    hf_config = huggingface_config(config, max_length=max_length)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(hf_config, attn_implementation=integration.NAME, dtype=dtype)
    return LanguageModel(causal_lm.train(), loss_chunk=loss_chunk)


def huggingface_config(config: ModelConfig, *, max_length: int) -> Any:
    """The Hugging Face config of these fields, or the one in `config.path`."""
    from transformers import AutoConfig, LlamaConfig

    if config.path is not None:
        try:
            return AutoConfig.from_pretrained(str(Path(config.path).expanduser()), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.path={config.path!r} is not a Hugging Face model folder: {error}") from error
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max_length,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


@torch.no_grad()
def materialize(model: LanguageModel, config: ModelConfig, *, device: torch.device, seed: int) -> None:
    """Give a model on the meta device, sharded or not, its storage, weights and buffers.

    Each parameter has a generator of its own, seeded from `seed` and its name, and every rank cuts its shard from the
    same whole: the start of a run does not depend on the number of ranks. With `config.path` the weights come from the
    folder's safetensors instead, one tensor at a time.
    """
    causal_lm = model.causal_lm
    model.to_empty(device=device)
    # to_empty makes one parameter of each use of a tied one.
    causal_lm.tie_weights()
    rebuild_buffers(causal_lm, device)
    first = first_weights(causal_lm, config, device=device, seed=seed)
    for name, parameter in causal_lm.named_parameters():
        whole = first(name, parameter)
        if isinstance(parameter, DTensor):
            # Every rank holds the whole already: cut, do not send.
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(whole)


def first_weights(
    causal_lm: Any, config: ModelConfig, *, device: torch.device, seed: int
) -> Callable[[str, Tensor], Tensor]:
    """A function that gives a parameter's whole first value, from its name in `causal_lm` and the parameter."""
    source = _from_folder(Path(config.path).expanduser()) if config.path is not None else None
    spread = causal_lm.config.initializer_range

    def first(name: str, parameter: Tensor) -> Tensor:
        if source is not None:
            whole: Tensor = source(name, parameter.shape)
            return whole.to(device, parameter.dtype)
        return _initial(name, parameter, spread, device=device, seed=seed)

    return first


def _initial(name: str, parameter: Tensor, spread: float, *, device: torch.device, seed: int) -> Tensor:
    """The whole initial parameter: matrices are normal with this standard deviation, norms 1, biases 0."""
    if parameter.ndim == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        return torch.full(parameter.shape, value, dtype=parameter.dtype, device=device)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return whole.normal_(0.0, spread, generator=generator)


def rebuild_buffers(causal_lm: nn.Module, device: torch.device) -> None:
    """Rotary frequencies are in no checkpoint, and after `to_empty` they are whatever was in memory: make them anew."""
    for name, module in causal_lm.named_modules():
        if not module._buffers:
            continue
        if "inv_freq" not in module._buffers or not hasattr(module, "config"):
            raise ValueError(
                f"do not know how to rebuild the buffers {list(module._buffers)} of {name} ({type(module).__name__}) "
                "after building on the meta device. Use a model whose only buffers are rotary frequencies."
            )
        for buffer, value in type(module)(module.config).named_buffers(recurse=False):
            setattr(module, buffer, value.to(device))


def _from_folder(folder: Path) -> Any:
    """A function that gives a named tensor of a folder's safetensors, one file or several with an index."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    else:
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ValueError(f"model.path={str(folder)!r} holds neither model.safetensors nor its index.")
        with safe_open(single, framework="pt") as content:
            files = dict.fromkeys(content.keys(), single)

    def read(name: str, shape: torch.Size) -> Tensor:
        if name not in files:
            raise ValueError(f"model.path={str(folder)!r} has no weight named {name}; it has {sorted(files)[:3]}, ...")
        with safe_open(files[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
        if tensor.shape != shape:
            raise ValueError(f"{name} in {str(folder)!r} is {list(tensor.shape)}, but the model's is {list(shape)}.")
        return tensor

    return read
