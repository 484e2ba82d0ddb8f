"""The optimizer, for the engines that take one from torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from fm_longctx.train.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device) -> Optimizer:
    """AdamW over those that train, with weight decay on matrices only."""
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
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=device.type == "cuda")
