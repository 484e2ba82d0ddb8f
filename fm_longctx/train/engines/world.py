"""This process among the ranks."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fm_longctx.train.config import Config


@dataclass(frozen=True, kw_only=True)
class World:
    """Which part of the data this rank has. Tensor ranks lie inside context ranks, and these inside data ranks.

    Without pipeline stages rank r is tensor rank r % tensor, context rank r // tensor % context and data rank
    r // (tensor x context). Pipeline stages, which Megatron alone has, lie outside all of them.
    """

    device: torch.device
    """Where this rank computes."""
    dp_rank: int
    """Which of the data ranks."""
    dp_size: int
    """Data ranks: each has sequences of its own."""
    cp_rank: int
    """Place among the ranks that share this rank's sequences."""
    cp_size: int
    """Ranks that share a sequence."""
    cp_group: dist.ProcessGroup
    """These ranks."""
    tp_size: int = 1
    """Ranks that split heads."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def copies(self) -> int:
        """Ranks that hold one and the same part of a batch: tensor ranks x pipeline stages."""
        return self.size // (self.dp_size * self.cp_size)


def start_process_group(config: Config) -> torch.device:
    """Start the process group, unless one is there, and give this rank's device. Without torchrun: one rank.

    Raises:
        ValueError: `train.device: cuda` on a machine without it.
    """
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
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            # torchrun keeps one store over its restarts, in which the dead ranks' addresses still are.
            attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(backend, timeout=timeout, store=attempt, rank=rank, world_size=size)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


def mesh_world(config: Config, device: torch.device) -> World:
    """The world of the engines without pipeline stages. A collective: every rank calls it."""
    parallel = config.parallel
    shape = (parallel.data_ranks(dist.get_world_size()), parallel.context, parallel.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp", "tp"))
    return World(
        device=device,
        dp_rank=mesh.get_local_rank("dp"),
        dp_size=shape[0],
        cp_rank=mesh.get_local_rank("cp"),
        cp_size=shape[1],
        cp_group=mesh.get_group("cp"),
        tp_size=shape[2],
    )
