"""DeepSpeed's ZeRO, through the plug: every rank is a data rank to it, and the loss is scaled for its average."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fm_longctx.data import Batch
from fm_longctx.integrations import deepspeed as plug
from fm_longctx.train.config import Config
from fm_longctx.train.engines.base import Engine
from fm_longctx.train.engines.optimizer import make_optimizer
from fm_longctx.train.engines.world import World
from fm_longctx.train.memory import prepare_layers
from fm_longctx.train.model import LanguageModel, build, first_weights, rebuild_buffers
from fm_longctx.train.step import NextToken, StepResult, Task, count_labels, mask_keyword, mean_loss, refuse_other_tasks
from fm_longctx.train.token_losses import evaluate_batch

_FOLDER = "deepspeed"


class DeepSpeedEngine(Engine):
    """ZeRO stage 1, 2 or 3 around a Hugging Face model; arguments as of `FsdpEngine`.

    In bfloat16 the float32 master weights start from the exact ones, as fsdp's do, not from the model's rounded ones.
    """

    name = "deepspeed"

    def __init__(
        self, config: Config, world: World, *, task: Task | None = None, model: LanguageModel | None = None
    ) -> None:
        self.world, self.task = world, task or NextToken()
        refuse_other_tasks(self.task, "parallel.engine: deepspeed", "parallel.engine to fsdp")
        plug._library()  # says what to do if it is missing
        # It asks the environment, where only torchrun tells.
        os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
        self.stage = config.parallel.zero_stage or 3
        self.accumulation = config.train.gradient_accumulation
        dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        if model is None:
            model = build(
                config.model, max_length=config.data.sequence_length, loss_chunk=config.train.loss_chunk, dtype=dtype
            )
        self.model, self.hf_config = model, model.causal_lm.config
        self.num_parameters = sum(p.numel() for p in model.parameters())
        prepare_layers(model, config.train)
        settings = deepspeed_config(config)
        place(model, config, settings, device=world.device, partition=self.stage == 3)
        optimizer = make_optimizer(model.parameters(), config.optimizer, world.device)
        self.engine = plug.initialize(model=model, optimizer=optimizer, config=settings)[0]
        if dtype == torch.bfloat16:
            self._exact_masters(config)

    def gradients(self, batches: Sequence[Batch]) -> StepResult:
        world, engine = self.world, self.engine
        if len(batches) != self.accumulation:
            raise ValueError(f"DeepSpeed was told of {self.accumulation} micro-batches a step, got {len(batches)}.")
        labels = count_labels(self.task, batches, world)
        # DeepSpeed averages over all ranks and over the micro-batches.
        scale = world.size * self.accumulation / labels
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for i, batch in enumerate(batches):
            here = batch.to(world.device)
            loss_sum = self.task.loss(engine, here, mask_keyword(here, world))
            engine.backward(loss_sum * scale)
            if i + 1 < len(batches):
                engine.step()  # counts the micro-batch
            total += loss_sum.detach()
        return StepResult(loss=mean_loss(total, labels, world), grad_norm=self._norm(), labels=labels)

    def token_losses(self, batch: Batch) -> Tensor:
        return evaluate_batch(self.engine, batch, self.world, chunk=self.model.loss_chunk)

    def update(self) -> None:
        self.engine.step()

    def discard(self) -> None:
        # DeepSpeed drops by itself a step whose gradient is not finite, and clears all that it keeps of it.
        for gradients in self.engine.optimizer.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(math.nan)
        self.engine.step()

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Empty: DeepSpeed writes its own files."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: DeepSpeed reads its own files."""

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=_FOLDER, save_latest=False)

    def load(self, folder: Path) -> None:
        if not (folder / _FOLDER).is_dir():
            raise ValueError(
                f"the checkpoint {folder} was not written by parallel.engine: deepspeed. Go on with the engine that "
                "wrote it, or start from its exported weights (model.path)."
            )
        ranks = len(list((folder / _FOLDER).glob("*zero_pp_rank_*_optim_states.pt")))
        if ranks != self.world.size:
            raise ValueError(
                f"DeepSpeed's checkpoint {folder} is of {ranks} ranks and this job has {self.world.size}. Start as "
                "many, or start from its exported weights (model.path)."
            )
        path, _ = self.engine.load_checkpoint(str(folder), tag=_FOLDER)
        if path is None:
            raise ValueError(f"DeepSpeed could not load the checkpoint {folder}; its log above says why.")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for name, parameter in self.model.causal_lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else nullcontext():
                shape = parameter.shape
                whole = parameter.detach().clone()
            if whole.dtype != torch.float32:
                # The masters are what training goes on from.
                whole = deepspeed.utils.safe_get_full_fp32_param(parameter).view(shape)
            yield name, whole.cpu() if self.world.rank == 0 else whole.new_empty(0, device="cpu")

    @torch.no_grad()
    def _exact_masters(self, config: Config) -> None:
        """Give the masters, which DeepSpeed has made from the rounded weights, the digits that those have lost.

        The first updates are often smaller than these.
        """
        import deepspeed

        world, causal_lm = self.world, self.model.causal_lm
        first = first_weights(causal_lm, config.model, device=world.device, seed=config.train.seed)
        for name, parameter in causal_lm.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            exact = first(name, torch.empty(shape, dtype=torch.float32, device="meta"))
            if self.stage < 3:
                deepspeed.utils.safe_set_full_fp32_param(parameter, exact)
                continue
            # A rank's part; DeepSpeed's own way for the whole fails where the parts are padded.
            size = deepspeed.utils.safe_get_local_fp32_param(parameter).numel()
            flat = functional.pad(exact.flatten(), (0, size * world.size - exact.numel()))
            deepspeed.utils.safe_set_local_fp32_param(parameter, flat[size * world.rank :][:size])

    def _norm(self) -> float:
        """The gradient's norm, which DeepSpeed itself takes only as it steps; nan where DeepSpeed has -1."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(optimizer._get_norm_groups()))
        else:
            norm = float(optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.nan


def deepspeed_config(config: Config) -> dict[str, Any]:
    """What `deepspeed.initialize` is told."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": {"stage": config.parallel.zero_stage or 3},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        plug.SECTION: {
            "context_parallel_size": config.parallel.context,
            "strategy": config.parallel.strategy,
            "chunk_size": config.parallel.chunk_size,
            "num_stages": config.parallel.stages,
        },
    }
    if config.train.precision == "bfloat16":
        settings["bf16"] = {"enabled": True}
    return settings


@torch.no_grad()
def place(
    model: LanguageModel, config: Config, settings: Mapping[str, Any], *, device: torch.device, partition: bool
) -> None:
    """Give a model on the meta device its storage and first weights; as `materialize`, layer by layer.

    With `partition` (ZeRO-3) each layer is cut as soon as it has its weights: no rank ever holds the whole model.
    """
    causal_lm = model.causal_lm
    first = first_weights(causal_lm, config.model, device=device, seed=config.train.seed)
    names = {p: name for name, p in causal_lm.named_parameters()}
    # A tied parameter stays one.
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in (*model.layers, causal_lm):
        for module in part.modules():
            for key, empty in list(module.named_parameters(recurse=False)):
                if empty.is_meta:
                    if empty not in made:
                        made[empty] = nn.Parameter(first(names[empty], empty), requires_grad=empty.requires_grad)
                    setattr(module, key, made[empty])
        if partition:
            _partition(part, settings)
    rebuild_buffers(causal_lm, device)
    if partition:
        import deepspeed

        # The loss takes this weight without calling its module: it has to be gathered for the whole model's forward.
        deepspeed.zero.register_external_parameter(model, causal_lm.get_output_embeddings().weight)


def _partition(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Cut its parameters over the ranks, those that are not yet."""
    import deepspeed

    known = {key: value for key, value in settings.items() if key != plug.SECTION}
    deepspeed.init_distributed()
    deepspeed.zero.Init(module=module, config_dict_or_path=known, mem_efficient_linear=False)
