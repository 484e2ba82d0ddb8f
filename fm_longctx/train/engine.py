"""Ranks, mesh and sharding: FSDP2 over every data and context rank."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from fm_longctx.train.config import Config, OptimizerConfig
from fm_longctx.train.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks. Rank r is data rank r // cp_size and context rank r % cp_size."""

    device: torch.device
    """Where this rank computes."""
    mesh: DeviceMesh
    """The (data, context) mesh, axes "dp" and "cp"."""
    shard_mesh: DeviceMesh
    """All ranks in a line: parameters are sharded, and gradients averaged, over it."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def dp_rank(self) -> int:
        return self.mesh.get_local_rank("dp")

    @property
    def cp_rank(self) -> int:
        return self.mesh.get_local_rank("cp")

    @property
    def dp_size(self) -> int:
        return self.mesh["dp"].size()

    @property
    def cp_size(self) -> int:
        return self.mesh["cp"].size()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("cp")


def start(config: Config) -> World:
    """Start the process group (unless one is there) and make the mesh. Without torchrun: a world of one rank."""
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("train.device: cuda, but torch finds no CUDA device. Set train.device to cpu.")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        # Checkpoints and checks across ranks talk on the CPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=config.parallel.timeout_seconds)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    shape = (config.parallel.data_ranks(size), config.parallel.context)
    return World(
        device=device,
        mesh=init_device_mesh(kind, shape, mesh_dim_names=("dp", "cp")),
        shard_mesh=init_device_mesh(kind, (size,), mesh_dim_names=("dp_cp",)),
    )


def shard(model: LanguageModel, config: Config, mesh: DeviceMesh) -> None:
    """Shard every layer, then the rest, over the mesh (FSDP2). Works on the meta device, before `materialize`."""
    if config.train.activation_checkpointing == "full":
        for layer in model.layers:
            recompute_in_backward(layer)
    precision = MixedPrecisionPolicy()
    if config.train.precision == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=config.parallel.reshard_after_forward)
    # Embedding and output projection are needed at both ends of the forward and first in the backward: keep them.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def recompute_in_backward(layer: nn.Module) -> None:
    """Keep the layer's input only and run its forward again in the backward.

    `forward` is replaced, not the call around it, so that the sharding's hooks stay outside and run once. The layer's
    arguments, the mask among them, are passed to the recomputation as they were.
    """
    forward: Callable[..., Any] = layer.forward
    layer.forward = partial(checkpoint, forward, use_reentrant=False)


def make_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> Optimizer:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=device.type == "cuda")
