"""FSDP2: parameters sharded over every data and context rank, or over those of a replica (HSDP)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fm_longctx.data import Batch
from fm_longctx.train.config import Config
from fm_longctx.train.engines.base import Engine
from fm_longctx.train.engines.optimizer import make_optimizer
from fm_longctx.train.engines.tensor_parallel import split
from fm_longctx.train.engines.world import World
from fm_longctx.train.memory import prepare_layers
from fm_longctx.train.model import LanguageModel, materialize
from fm_longctx.train.step import NextToken, StepResult, Task, count_labels, mask_keyword, mean_loss, refuse_other_tasks
from fm_longctx.train.tasks.models import build_model
from fm_longctx.train.tasks.task import figures_of
from fm_longctx.train.token_losses import evaluate_batch


class FsdpEngine(Engine):
    """PyTorch's own sharding, around a Hugging Face model.

    Args:
        model: on the meta device, not sharded; the config's if not given.
        task: the loss; next-token prediction if not given.
    """

    name = "fsdp"

    def __init__(
        self, config: Config, world: World, *, task: Task | None = None, model: LanguageModel | None = None
    ) -> None:
        self.world, self.task = world, task or NextToken()
        self.clip_norm = math.inf if config.optimizer.clip_norm is None else config.optimizer.clip_norm
        if model is None:
            model = build_model(config)
        self.model, self.hf_config = model, model.causal_lm.config
        mesh = rank_mesh(config, world)
        if config.parallel.tensor > 1:
            refuse_other_tasks(self.task, f"parallel.tensor={config.parallel.tensor}", "parallel.tensor to 1")
            split(model, mesh["tensor"])
        stochastic = config.train.precision == "bfloat16_stochastic"
        if stochastic and world.size == 1:
            # One rank keeps its weights as they compute: FSDP would hold a second copy of those that it gathers.
            prepare_layers(model, config.train)
        else:
            shard(model, config, _parameter_axes(mesh))
        # A checkpoint's weights need no other start, but the buffers and the storage do.
        materialize(model, config.model, device=world.device, seed=config.train.seed)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = make_optimizer(model.parameters(), config.optimizer, world.device, stochastic=stochastic)

    def gradients(self, batches: Sequence[Batch]) -> StepResult:
        world = self.world
        labels = count_labels(self.task, batches, world)
        # FSDP averages over the data and context ranks.
        scale = world.dp_size * world.cp_size / labels
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for batch in batches:
            here = batch.to(world.device)
            loss_sum = self.task.loss(self.model, here, mask_keyword(here, world))
            (loss_sum * scale).backward()
            total += loss_sum.detach()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return StepResult(
            loss=mean_loss(total, labels, world),
            grad_norm=float(self._norm),
            labels=labels,
            figures=figures_of(self.task),
        )

    def token_losses(self, batch: Batch) -> Tensor:
        return evaluate_batch(self.model, batch, self.world, chunk=self.model.loss_chunk)

    def update(self) -> None:
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, self._norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        causal_lm = self.model.causal_lm
        frozen = {n for n, p in causal_lm.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {
            # What is frozen is in the folder, or follows from the seed, that the run started from.
            "model": {n: w for n, w in get_model_state_dict(causal_lm).items() if n not in frozen},
            "optimizer": get_optimizer_state_dict(causal_lm, self.optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        causal_lm = self.model.causal_lm
        set_model_state_dict(causal_lm, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(causal_lm, self.optimizer, state["optimizer"])

    def save(self, folder: Path) -> None:
        """Nothing: all of it is in `state_dict`."""

    def load(self, folder: Path) -> None:
        """Nothing: all of it is in `state_dict`."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.causal_lm.named_parameters():
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            yield name, whole.cpu() if self.world.rank == 0 else whole.new_empty(0, device="cpu")


def rank_mesh(config: Config, world: World) -> DeviceMesh:
    """The ranks as replicas x shards x tensor ranks; data and context ranks are the first two together."""
    replicas, tensor = config.parallel.replicate, config.parallel.tensor
    shape = (replicas, world.size // (replicas * tensor), tensor)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))


def parameter_mesh(config: Config, world: World) -> DeviceMesh:
    """The ranks that parameters are sharded over, in a line; for HSDP (replicas, shards)."""
    return _parameter_axes(rank_mesh(config, world))


def _parameter_axes(mesh: DeviceMesh) -> DeviceMesh:
    return mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]


def shard(model: LanguageModel, config: Config, mesh: DeviceMesh) -> None:
    """Shard every layer, then the rest, over the mesh (FSDP2). Works on the meta device, before `materialize`."""
    prepare_layers(model, config.train)
    precision = MixedPrecisionPolicy()
    if config.train.precision != "float32":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=config.parallel.reshard_after_forward)
    # Embedding and output projection are needed at both ends of the forward and first in the backward: keep them.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
