"""The training loop: from a config to a run folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fm_longctx import ContextParallel
from fm_longctx.data import IGNORED, Batch, ByteTokenizer, Loader, PackedStream, TextFiles
from fm_longctx.train import checkpoint, engine
from fm_longctx.train.config import Config, DataConfig
from fm_longctx.train.config_load import to_yaml
from fm_longctx.train.engine import World
from fm_longctx.train.metrics import Reporter, StepMetrics
from fm_longctx.train.model import LanguageModel, build, huggingface_config, materialize
from fm_longctx.train.schedule import learning_rate_factor


class TrainingError(RuntimeError):
    """Training cannot go on, on any rank; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where to go on from."""

    path: Path
    state: checkpoint.RunState


def prepare(config: Config, ranks: int) -> Resume | None:
    """Everything that can be refused before a process group exists. Every rank calls it and comes to the same answer.

    Returns:
        the checkpoint to go on from, if there is one.

    Raises:
        ValueError: see `Config.check_world`, `TextFiles`, `checkpoint.inspect`; or the folder holds a run already.
    """
    config.check_world(ranks)
    documents(config.data)
    folder = Path(config.train.folder)
    path = None
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        if config.train.if_exists == "refuse":
            raise ValueError(
                f"{folder} holds a run already. Continue it with --train.if_exists resume, start over with "
                "--train.if_exists replace, or choose another --train.folder."
            )
        if config.train.if_exists == "resume":
            path = checkpoint.latest(folder / "checkpoints")
    if path is None and config.checkpoint.load is not None:
        path = Path(config.checkpoint.load).expanduser()
    if path is None:
        return None
    hf_config = huggingface_config(config.model, max_length=config.data.sequence_length)
    return Resume(path=path, state=checkpoint.inspect(path, hf_config))


def documents(config: DataConfig) -> TextFiles:
    """The documents that the data section names."""
    if config.source == "python_stdlib":
        return TextFiles.python_stdlib(max_bytes=config.max_bytes)
    assert config.path is not None
    return TextFiles.from_path(config.path, pattern=config.pattern, max_bytes=config.max_bytes)


def run(config: Config, resume: Resume | None) -> None:
    """Train, on this rank of however many there are. `resume` is what `prepare` returned."""
    world = engine.start(config)
    folder = Path(config.train.folder)
    if world.rank == 0:
        _open_folder(folder, config)
    dist.barrier()

    model = build(config.model, max_length=config.data.sequence_length, loss_chunk=config.train.loss_chunk)
    engine.shard(model, config, world.shard_mesh)
    # A checkpoint's weights need no other start, but the buffers and the storage do.
    materialize(model, config.model, device=world.device, seed=config.train.seed)
    optimizer = engine.make_optimizer(model, config.optimizer, world.device)
    loader = make_loader(config, world)

    step = 0
    if resume is not None:
        checkpoint.load(resume.path, model, optimizer, resume.state)
        loader.load_state_dict(resume.state.data)
        step = resume.state.step

    end = min(config.train.steps, config.train.stop_at or config.train.steps)
    reporter = Reporter(folder, start=step, steps=end, log_every=config.train.log_every, rank=world.rank)
    with reporter:
        reporter.say(_headline(config, model, world, resume))
        try:
            while step < end:
                began = time.perf_counter()
                batches = [next(loader) for _ in range(config.train.gradient_accumulation)]
                if step == 0:
                    _draw_mask(folder, batches[0], world)
                factor = learning_rate_factor(step, config.train.steps, config.schedule)
                for group in optimizer.param_groups:
                    group["lr"] = config.optimizer.lr * factor
                result = train_step(model, optimizer, batches, world, clip_norm=config.optimizer.clip_norm)
                step += 1
                reporter.step(_metrics(step, result, batches, world, optimizer, time.perf_counter() - began))
                due = config.checkpoint.every is not None and step % config.checkpoint.every == 0
                if due or (step == end and (config.checkpoint.at_end or end < config.train.steps)):
                    state = checkpoint.RunState(
                        step=step,
                        data=loader.state_dict(),
                        model=checkpoint.shape_of(model.causal_lm.config),
                        ranks=world.size,
                    )
                    place = checkpoint.save(
                        folder / "checkpoints", model, optimizer, state, keep=config.checkpoint.keep
                    )
                    reporter.say(f"step {step}: checkpoint {place}")
        finally:
            loader.close()


def make_loader(config: Config, world: World) -> Loader:
    """This rank's loader."""
    stream = PackedStream(
        documents(config.data),
        ByteTokenizer(),
        sequence_length=config.data.sequence_length,
        seed=config.data.seed,
    )
    return Loader(
        stream,
        batch_size=config.data.batch_size,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        cp_rank=world.cp_rank,
        cp_size=world.cp_size,
        plan_options=config.parallel.plan_options,
    )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step knows afterwards, the same on every rank."""

    loss: float
    """Mean over the step's labels."""
    grad_norm: float
    """Before clipping."""
    labels: int
    """Over all ranks and micro-batches."""


def train_step(
    model: LanguageModel, optimizer: Optimizer, batches: Sequence[Batch], world: World, *, clip_norm: float | None
) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    Every label of the step weighs the same, whatever rank and micro-batch it is in: the labels are counted
    over all of them before the first backward, each local sum is divided by that count, and multiplied by the number of
    ranks because the engine averages gradients over them.

    Raises:
        TrainingError: the gradient is not finite; on every rank, before the optimizer has moved.
    """
    count = torch.tensor([sum(int((b.labels != IGNORED).sum()) for b in batches)], device=world.device)
    dist.all_reduce(count)
    labels = int(count)
    if labels == 0:
        raise TrainingError("no token of this step has anything to predict: all its documents have one token.")

    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in batches:
        here = batch.to(world.device)
        loss_sum = model(here.tokens, here.labels, here.positions, **mask_keyword(here, world))
        (loss_sum * (world.size / labels)).backward()
        total += loss_sum.detach()
    dist.all_reduce(total)

    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip_norm is None else clip_norm)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(grad_norm):
        raise TrainingError(
            f"the gradient norm is {grad_norm} (loss {float(total) / labels:.4f}); the weights are the "
            "previous step's. Lower optimizer.lr, lengthen schedule.warmup_steps, or resume from the last checkpoint."
        )
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss=float(total) / labels, grad_norm=grad_norm, labels=labels)


def mask_keyword(batch: Batch, world: World) -> dict[str, Any]:
    """How the batch's mask is handed to the model: itself, or under a context where sequences are sharded."""
    if world.cp_size == 1:
        return {"flashmask": batch.mask}
    return {"context": ContextParallel(world.cp_group, batch.local, device=world.device)}


def _metrics(
    step: int, result: StepResult, batches: Sequence[Batch], world: World, optimizer: Optimizer, seconds: float
) -> StepMetrics:
    # Context ranks report the same batch, so it counts cp_size times in every sum; the ratios do not mind.
    own = [
        sum(b.visible_area for b in batches),
        sum(b.num_scores for b in batches),
        sum(b.num_tokens for b in batches) / world.cp_size,
        sum(b.plan.imbalance for b in batches) / (len(batches) * world.size),
        sum(b.plan.received_fraction for b in batches) / (len(batches) * world.size),
    ]
    sums = torch.tensor(own, dtype=torch.float64, device=world.device)
    dist.all_reduce(sums)
    area, scores, tokens, imbalance, received = sums.tolist()
    on_gpu = world.device.type == "cuda"
    return StepMetrics(
        step=step,
        loss=result.loss,
        tokens_per_second=tokens / seconds,
        visible_fraction=area / scores,
        grad_norm=result.grad_norm,
        lr=optimizer.param_groups[0]["lr"],
        imbalance=imbalance,
        received_fraction=received,
        labels=result.labels,
        seconds=seconds,
        peak_memory_gib=torch.cuda.max_memory_allocated(world.device) / 2**30 if on_gpu else None,
    )


def _open_folder(folder: Path, config: Config) -> None:
    """Make the run folder and write the resolved config; under `replace`, remove what an earlier run wrote."""
    if config.train.if_exists == "replace":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in ("metrics.jsonl", "mask.png", "config.yaml"):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))


def _draw_mask(folder: Path, batch: Batch, world: World) -> None:
    """A picture of the first batch's first mask, each context rank's rows in a colour of their own."""
    if world.rank == 0:
        owner = torch.empty(batch.plan.num_tokens, dtype=torch.int64)
        for rank in range(batch.plan.world_size):
            owner[batch.plan.rows(rank)] = rank
        batch.mask.draw(folder / "mask.png", rank_of_row=owner)


def _headline(config: Config, model: LanguageModel, world: World, resume: Resume | None) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    text = (
        f"{parameters:,} parameters on {world.size} {world.device.type} rank(s): data {world.dp_size} x context "
        f"{world.cp_size}; {config.data.sequence_length:,} tokens a sequence; {config.train.folder}"
    )
    return text if resume is None else f"{text}\nresuming from {resume.path} at step {resume.state.step}"
