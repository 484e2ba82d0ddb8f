"""The training loop: from a config to a run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from fm_longctx.data import Batch
from fm_longctx.train import checkpoint, engine
from fm_longctx.train.config import Config
from fm_longctx.train.engine import World
from fm_longctx.train.inputs import make_loader
from fm_longctx.train.metrics import Reporter, StepMetrics
from fm_longctx.train.model import LanguageModel, build, materialize
from fm_longctx.train.schedule import learning_rate_factor
from fm_longctx.train.start import Resume, open_folder
from fm_longctx.train.step import StepResult, train_step


def run(config: Config, resume: Resume | None) -> None:
    """Train, on this rank of however many there are. `resume` is what `prepare` returned."""
    world = engine.start(config)
    folder = Path(config.train.folder)
    if world.rank == 0:
        open_folder(folder, config)
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
