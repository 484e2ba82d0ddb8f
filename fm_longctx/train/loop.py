"""The training loop: from a config to a run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from fm_longctx.data import Batch
from fm_longctx.train import checkpoint
from fm_longctx.train.config import Config
from fm_longctx.train.engines import Engine, World, make_engine, start
from fm_longctx.train.inputs import make_loader
from fm_longctx.train.metrics import Reporter, StepMetrics
from fm_longctx.train.schedule import learning_rate_factor
from fm_longctx.train.start import Resume, open_folder
from fm_longctx.train.step import StepResult, train_step


def run(config: Config, resume: Resume | None) -> None:
    """Train, on this rank of however many there are. `resume` is what `prepare` returned."""
    world = start(config)
    folder = Path(config.train.folder)
    if world.rank == 0:
        open_folder(folder, config)
    dist.barrier()

    engine = make_engine(config, world)
    loader = make_loader(config, world)

    step = 0
    if resume is not None:
        checkpoint.load(resume.path, engine, resume.state)
        loader.load_state_dict(resume.state.data)
        step = resume.state.step

    end = min(config.train.steps, config.train.stop_at or config.train.steps)
    reporter = Reporter(folder, start=step, steps=end, log_every=config.train.log_every, rank=world.rank)
    with reporter:
        reporter.say(_headline(config, engine, resume))
        try:
            while step < end:
                began = time.perf_counter()
                batches = [next(loader) for _ in range(config.train.gradient_accumulation)]
                if step == 0:
                    _draw_mask(folder, batches[0], world)
                factor = learning_rate_factor(step, config.train.steps, config.schedule)
                lr = config.optimizer.lr * factor
                engine.set_lr(lr)
                result = train_step(engine, batches)
                step += 1
                reporter.step(_metrics(step, result, batches, world, lr, time.perf_counter() - began))
                due = config.checkpoint.every is not None and step % config.checkpoint.every == 0
                if due or (step == end and (config.checkpoint.at_end or end < config.train.steps)):
                    state = checkpoint.RunState(
                        step=step,
                        data=loader.state_dict(),
                        model=checkpoint.shape_of(engine.hf_config),
                        ranks=world.size,
                    )
                    place = checkpoint.save(folder / "checkpoints", engine, state, keep=config.checkpoint.keep)
                    reporter.say(f"step {step}: checkpoint {place}")
        finally:
            loader.close()


def _metrics(
    step: int, result: StepResult, batches: Sequence[Batch], world: World, lr: float, seconds: float
) -> StepMetrics:
    # Ranks that share a batch all report it, so it counts that often in every sum; the ratios do not mind.
    own = [
        sum(b.visible_area for b in batches),
        sum(b.num_scores for b in batches),
        sum(b.num_tokens for b in batches) / (world.size // world.dp_size),
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
        lr=lr,
        imbalance=imbalance,
        received_fraction=received,
        labels=result.labels,
        task=result.figures,
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


def _headline(config: Config, engine: Engine, resume: Resume | None) -> str:
    world, parallel = engine.world, config.parallel
    ways = [f"data {world.dp_size}", f"context {world.cp_size}"]
    ways += [f"{kind} {ranks}" for kind in ("tensor", "pipeline") if (ranks := getattr(parallel, kind)) > 1]
    text = (
        f"{engine.num_parameters:,} parameters on {world.size} {world.device.type} rank(s): {' x '.join(ways)}, "
        f"{engine.name}; {config.data.sequence_length:,} tokens a sequence; {config.train.folder}"
    )
    return text if resume is None else f"{text}\nresuming from {resume.path} at step {resume.state.step}"
