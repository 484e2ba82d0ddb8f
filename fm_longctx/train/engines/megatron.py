"""Megatron-Core: its GPT, schedules and optimizer under our masks, from the same first weights as the other engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from fm_longctx import ContextParallel
from fm_longctx.data import IGNORED, Batch
from fm_longctx.integrations.megatron import FlashMaskParams, per_token_loss
from fm_longctx.train.config import Config
from fm_longctx.train.engines.base import Engine
from fm_longctx.train.engines.megatron_model import build_stage, check_model, megatron_config
from fm_longctx.train.engines.megatron_weights import entry, from_megatron, to_megatron
from fm_longctx.train.engines.world import World
from fm_longctx.train.model import build, first_weights, huggingface_config
from fm_longctx.train.step import (
    NextToken,
    StepResult,
    Task,
    check_mask_heads,
    count_labels,
    mean_loss,
    refuse_other_tasks,
)

_FOLDER = "megatron"


def _report(labelled: Tensor, losses: Tensor, non_loss_data: bool = False) -> Any:
    """What Megatron's schedule asks of a micro-batch: what it trains on; or with `non_loss_data` each token's loss."""
    if non_loss_data:
        return torch.where(labelled, losses.float(), 0).contiguous()
    return per_token_loss(labelled, losses)


def megatron_world(config: Config, device: torch.device) -> World:
    """Lay the ranks out as Megatron does: tensor, context, data ranks, pipeline stages, from the innermost outwards."""
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"parallel.engine: megatron needs a CUDA device, and this rank has {device}: Megatron-Core asks for one "
            "throughout. Set parallel.engine to fsdp or deepspeed."
        ) from error
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)
    return World(
        device=device,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_group=parallel_state.get_context_parallel_group(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


class MegatronEngine(Engine):
    """`GPTModel` under tensor, pipeline and context parallelism.

    Args:
        task: next-token prediction, which Megatron's schedules compute inside the model's last stage; no other.
    """

    name = "megatron"

    def __init__(self, config: Config, world: World, *, task: Task | None = None) -> None:
        self.world, self.task = world, task or NextToken()
        refuse_other_tasks(self.task, "parallel.engine: megatron", "parallel.engine to fsdp")
        self.batch_size, self.sequence_length = config.data.batch_size, config.data.sequence_length
        self.hf_config = huggingface_config(config.model, max_length=self.sequence_length)
        check_model(self.hf_config, config)
        self.settings = megatron_config(self.hf_config, config, world.device)
        # On the meta device: names, shapes and RoPE.
        template = build(config.model, max_length=self.sequence_length).causal_lm
        self._shapes = {name: p.shape for name, p in template.named_parameters()}
        self.num_parameters = sum(shape.numel() for shape in self._shapes.values())
        rotary = template.base_model.rotary_emb
        self.model = build_stage(
            self.hf_config,
            self.settings,
            max_length=self.sequence_length,
            rope=type(rotary)(self.hf_config),
        )
        # Megatron makes some weights on the CPU, and in float32 leaves moving them to its caller.
        self.model.to(world.device)
        self._fill(template, config)
        wrapped = Float16Module(self.settings, self.model) if self.settings.bf16 else self.model
        sharded = config.parallel.distributed_optimizer
        self.ddp = DistributedDataParallel(
            self.settings,
            DistributedDataParallelConfig(use_distributed_optimizer=sharded, grad_reduce_in_fp32=True),
            wrapped,
        )
        given = config.optimizer
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=given.lr,
                weight_decay=given.weight_decay,
                adam_beta1=given.beta1,
                adam_beta2=given.beta2,
                adam_eps=given.eps,
                clip_grad=given.clip_norm or 0.0,
                bf16=self.settings.bf16,
                params_dtype=self.settings.params_dtype,
                use_distributed_optimizer=sharded,
            ),
            [self.ddp],
        )
        # Megatron leaves it to its own learning-rate scheduler to keep norm weights from decaying.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = given.weight_decay * group["wd_mult"]

    def gradients(self, batches: Sequence[Batch]) -> StepResult:
        world = self.world
        labels = count_labels(self.task, batches, world)
        self.discard()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=self.sequence_length,
            micro_batch_size=self.batch_size,
        )
        # Only the last stage has losses, the same on its tensor ranks.
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for report in reports:
            total += report["lm loss"][0]
        loss = mean_loss(total, labels, world) * parallel_state.get_pipeline_model_parallel_world_size()
        self.optimizer.prepare_grads()
        return StepResult(loss=loss, grad_norm=float(self.optimizer.get_grad_norm()), labels=labels)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        self.ddp.eval()
        found = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter([batch]),
            model=[self.ddp],
            num_microbatches=1,
            # Held-out sequences may have a length of their own.
            seq_length=batch.num_tokens // len(batch.sequences),
            micro_batch_size=len(batch.sequences),
            forward_only=True,
            collect_non_loss_data=True,
        )
        self.ddp.train()
        # Only the last stage has them; it tells the others.
        losses: Tensor = found[0] if found else torch.empty(batch.tokens.shape, device=self.world.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(losses, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return losses

    def update(self) -> None:
        self.optimizer.step()

    def discard(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Empty: Megatron writes its own files."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: Megatron reads its own files."""

    def save(self, folder: Path) -> None:
        place = folder / _FOLDER
        if self.world.rank == 0:
            place.mkdir()
        dist.barrier()
        dist_checkpointing.save(self._sharded_state(is_loading=False), str(place))

    def load(self, folder: Path) -> None:
        place = folder / _FOLDER
        if not place.is_dir():
            raise ValueError(
                f"the checkpoint {folder} was not written by parallel.engine: megatron. Go on with the engine that "
                "wrote it, or start from its exported weights (model.path)."
            )
        state = dist_checkpointing.load(self._sharded_state(is_loading=True), str(place))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """In bfloat16 they are the model's, not the optimizer's masters."""
        own = dict(self.model.named_parameters())
        heads = self.hf_config.num_key_value_heads, self.hf_config.num_attention_heads
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, list(own) if self._is_first_of_stage() else [])
        first = self.hf_config.num_hidden_layers // self.settings.pipeline_model_parallel_size
        seen: set[str] = set()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        senders = [rank for rank, names in enumerate(everyone) if names]
        for s, sender in enumerate(senders):
            for name in everyone[sender]:
                e = entry(name, first_layer=s * first, tied=self.hf_config.tie_word_embeddings)
                if seen.intersection(e.names):
                    continue  # the last stage's copy of the embedding
                seen.update(e.names)
                whole: list[Tensor] = []
                if s == stage:
                    whole = from_megatron(e, self._gather(own[name], e.dim), groups=heads[0], queries=heads[1])
                for i, hf_name in enumerate(e.names):
                    yield hf_name, self._to_rank_0(whole[i] if whole else None, self._shapes[hf_name], sender)

    def _forward_step(self, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.world.device)
        check_mask_heads(batch, self.world)
        group = self.world.cp_group if self.world.cp_size > 1 else None
        params = FlashMaskParams(
            ContextParallel(group, batch.local, device=self.world.device), position_ids=batch.positions
        )
        labelled = batch.labels != IGNORED
        losses = model(
            batch.tokens,
            batch.positions,
            None,
            labels=torch.where(labelled, batch.labels, 0),
            loss_mask=labelled.float(),
            packed_seq_params=params,
        )
        return losses, partial(_report, labelled)

    @torch.no_grad()
    def _fill(self, template: Any, config: Config) -> None:
        """The first weights of this rank's part of the model."""
        first = first_weights(template, config.model, device=self.world.device, seed=config.train.seed)
        shapes = dict(template.named_parameters())
        offset = get_transformer_layer_offset(self.settings)
        for name, parameter in self.model.named_parameters():
            e = entry(name, first_layer=offset, tied=self.hf_config.tie_word_embeddings)
            part = to_megatron(
                e,
                lambda n: first(n, shapes[n]),
                groups=self.hf_config.num_key_value_heads,
                rank=parallel_state.get_tensor_model_parallel_rank(),
                size=parallel_state.get_tensor_model_parallel_world_size(),
            )
            assert part.shape == parameter.shape, f"{name}: {part.shape} for {parameter.shape}"
            parameter.copy_(part)

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        weights = self.model.sharded_state_dict()
        return {"model": weights, "optimizer": self.optimizer.sharded_state_dict(weights, is_loading=is_loading)}

    def _is_first_of_stage(self) -> bool:
        own = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return own == (0, 0)

    def _gather(self, part: Tensor, dim: int | None) -> list[Tensor]:
        """All tensor ranks' parts of a parameter."""
        mine = part.detach().contiguous()
        if dim is None:
            return [mine]
        parts = [torch.empty_like(mine) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        dist.all_gather(parts, mine, group=parallel_state.get_tensor_model_parallel_group())
        return parts

    def _to_rank_0(self, whole: Tensor | None, shape: torch.Size, sender: int) -> Tensor:
        """From the rank that has it to the CPU of rank 0; elsewhere empty."""
        nothing = torch.empty(0, dtype=self.settings.params_dtype)
        if self.world.rank == sender:
            assert whole is not None
            if sender == 0:
                return whole.cpu()
            dist.send(whole.contiguous(), dst=0)
        elif self.world.rank == 0:
            arriving = torch.empty(shape, dtype=nothing.dtype, device=self.world.device)
            dist.recv(arriving, src=sender)
            return arriving.cpu()
        return nothing
