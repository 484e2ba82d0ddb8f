"""Adapters through peft: added before the model is sharded, switched off for a reference, exported for peft."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fm_longctx.train.config.task import LoraConfig

_ADAPTER = "default"
"""peft's name for the only adapter of a model."""


def add_adapters(causal_lm: nn.Module, config: LoraConfig, *, frozen_dtype: torch.dtype) -> None:
    """Give a model, on the meta device, adapters; only they and a classifier's `score` head still ask for gradients.

    Args:
        frozen_dtype: of the weights that do not train.

    Raises:
        ValueError: peft is missing, or finds none of the target modules.
    """
    peft = _peft()
    try:
        peft.inject_adapter_in_model(_peft_config(config, has_head=hasattr(causal_lm, "score")), causal_lm, _ADAPTER)
    except ValueError as error:
        raise ValueError(f"lora.target_modules={config.target_modules!r}: {error}") from error
    for name, parameter in causal_lm.named_parameters():
        trains = is_exported(name)
        parameter.requires_grad_(trains)
        if not trains:
            parameter.data = parameter.data.to(frozen_dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter."""
    return ".lora_" in name


def is_exported(name: str) -> bool:
    """Whether a parameter trains beside a frozen base: an adapter's, or a classifier's score head."""
    return is_adapter(name) or name == "score.weight"


def plain_name(name: str) -> str:
    """The name that a parameter of the base has without adapters: its weights in a folder, and its seed."""
    return name.replace(".base_layer.", ".")


def initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The whole start of an adapter's matrix, as in peft: A is uniform in +- 1 / sqrt(inputs), and B is 0, so that the
    adapter changes nothing yet."""
    whole = torch.zeros(shape, device=generator.device)
    if ".lora_A." in name:
        spread = shape[1] ** -0.5
        whole.uniform_(-spread, spread, generator=generator)
    return whole


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is without its adapters."""
    # peft's own switch takes requires_grad from the adapters too, which a sharded parameter must keep.
    layers: list[Any] = [m for m in model.modules() if isinstance(m, _peft().tuners.tuners_utils.BaseTunerLayer)]
    assert layers
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False


def export(folder: Path, config: LoraConfig, weights: dict[str, Tensor], *, base: str | None) -> None:
    """Write adapters as peft reads them: `PeftModel.from_pretrained(base_model, folder)`.

    Args:
        weights: whole, those of `is_exported`, by their name in the model.
        base: the folder of the model they belong to, if it has one.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": value.contiguous() for name, value in weights.items()
    }
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config = _peft_config(config, has_head="score.weight" in weights)
    if "score.weight" in weights:
        peft_config.modules_to_save = ["score"]
    peft_config.base_model_name_or_path = base
    peft_config.inference_mode = True
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in peft_config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=1, sort_keys=True, default=str))


def _peft_config(config: LoraConfig, *, has_head: bool) -> Any:
    assert config.r is not None
    return _peft().LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type="SEQ_CLS" if has_head else "CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "lora.r needs peft: pip install peft. Or leave lora.r out to train the whole model."
        ) from error
    return peft
