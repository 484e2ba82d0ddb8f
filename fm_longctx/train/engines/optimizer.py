"""The optimizer, for the engines that take one from torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fm_longctx.train.config import OptimizerConfig
from fm_longctx.train.stochastic import stochastic_adamw


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device, *, stochastic: bool = False
) -> Optimizer:
    """AdamW over those that train, with weight decay on matrices only.

    Args:
        stochastic: parameters are bfloat16, and updates are rounded at random in proportion.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in parameters:
        if p.requires_grad:
            # A parameter that ZeRO-3 has cut is flat, and tells its shape.
            (matrices if len(getattr(p, "ds_shape", p.shape)) >= 2 else others).append(p)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if stochastic:
        return stochastic_adamw(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=device.type == "cuda")
