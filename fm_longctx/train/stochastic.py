"""AdamW on bfloat16 weights and moments, with stochastic rounding: torchao's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


def stochastic_adamw(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> Optimizer:
    """AdamW that computes each update in float32 and rounds the new weight to one of its two bfloat16 neighbours.

    The nearer one is the likelier, in proportion, so that on average a weight moves as far as it should: rounded to
    the nearest, an update below a 256th of a weight would be lost. Works on plain parameters and on FSDP2's.

    Args:
        groups: parameter groups, of bfloat16 parameters.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.optim import _AdamW  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(
            "train.precision: bfloat16_stochastic needs torchao. Install it with: pip install torchao, or set "
            "train.precision to bfloat16."
        ) from error

    class StochasticAdamW(_AdamW):
        """Takes its learning rates as numbers, as torch's own optimizers do."""

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)
            on_gpu = self.param_groups[0]["params"][0].device.type == "cuda"
            # It compiles the update; on a CPU that would ask for a C++ compiler.
            with torch.compiler.set_stance("default" if on_gpu else "force_eager"):
                result = super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            return result

    optimizer: Optimizer = StochasticAdamW(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=True)
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])
    return optimizer
