"""The training loop: from a config to a run folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from fm_longctx.context_parallel.waits import measuring
from fm_longctx.data import Batch, Loader
from fm_longctx.train import checkpoint, evaluation, faults
from fm_longctx.train.checkpoint_writer import CheckpointWriter
from fm_longctx.train.config import Config
from fm_longctx.train.engines import Engine, World, make_engine, start
from fm_longctx.train.export import export_engine
from fm_longctx.train.flops import FlopCount, peak_tflops
from fm_longctx.train.inputs import make_loader
from fm_longctx.train.metrics import Reporter, StepMetrics
from fm_longctx.train.model import build
from fm_longctx.train.profiler import Profiler, memory_snapshot
from fm_longctx.train.schedule import learning_rate_factor
from fm_longctx.train.start import Resume, open_folder, tokenizer_folder
from fm_longctx.train.step import StepResult, TrainingError, train_step
from fm_longctx.train.tasks.export import export_adapters
from fm_longctx.train.trackers import make_trackers


def run(config: Config, resume: Resume | None) -> None:
    """Train, on this rank of however many there are. `resume` is what `prepare` returned.

    SIGTERM, on any rank, ends the run after the step under way, with a checkpoint, as if it were over.

    Raises:
        TrainingError: too many steps were skipped, or the last checkpoint could not be written.
    """
    folder = Path(config.train.folder)
    with ExitStack() as stack:
        stack.enter_context(_determinism(config))
        world = start(config)
        torch.manual_seed(config.train.seed + world.rank)
        stack.enter_context(memory_snapshot(folder, rank=world.rank, history=config.train.memory_history))
        if world.rank == 0:
            open_folder(folder, config, resume)
        dist.barrier()
        training = _Run(config, resume, world, stack)
        # Not before: until here there is nothing to save, and a rank that waits for others can just end.
        training.stop = stack.enter_context(faults.StopSignal())
        training.train()


class _Run:
    """What the steps of a run share. `stack` closes what has to be closed."""

    stop: faults.StopSignal

    def __init__(self, config: Config, resume: Resume | None, world: World, stack: ExitStack) -> None:
        self.config, self.world = config, world
        self.folder = Path(config.train.folder)
        self.engine: Engine = make_engine(config, world)
        self.loader: Loader = make_loader(config, world)
        stack.callback(self.loader.close)
        self.watch = faults.Watch(spike_factor=config.train.spike_factor, max_skipped=config.train.max_skipped)
        self.writer = CheckpointWriter(
            self.folder / "checkpoints", keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        self.step = 0
        if resume is not None:
            checkpoint.load(resume.path, self.engine, resume.state)
            self.loader.load_state_dict(resume.state.data)
            self.watch.load_state_dict(resume.state.watch)
            self.step = resume.state.step
        self.end = min(config.train.steps, config.train.stop_at or config.train.steps)
        self.meter = _Meter(config, world)
        self.clock = stack.enter_context(measuring())
        self.profiler = Profiler(self.folder, config.train.profiled if world.rank == 0 else range(0), rank=world.rank)
        trackers = make_trackers(self.folder, config, start=self.step) if world.rank == 0 else []
        self.reporter = stack.enter_context(
            Reporter(
                self.folder,
                start=self.step,
                steps=self.end,
                log_every=config.train.log_every,
                rank=world.rank,
                trackers=trackers,
            )
        )
        self.reporter.say(_headline(config, self.engine, resume))

    def train(self) -> None:
        if self.step == 0:
            self._evaluate()
        stopped, saved = False, self.step
        while self.step < self.end and not stopped:
            stopped = self._one_step()
            every = self.config.checkpoint.every
            at_end = self.step == self.end and (self.config.checkpoint.at_end or self.end < self.config.train.steps)
            if stopped or at_end or (every is not None and self.step % every == 0):
                self.writer.save(self.engine, self._state())
                saved = self.step
            if not stopped and self._evaluation_due():
                self._evaluate()
            self._tell()
        self.writer.wait()
        self._tell()
        if self.writer.failed is not None and saved == self.step:
            raise TrainingError(
                f"the last checkpoint, of step {saved}, could not be written: {self.writer.failed}. Make room and "
                "resume from the one before (--train.if_exists resume)."
            )
        if stopped:
            self.reporter.say(f"step {self.step}: ended by SIGTERM; --train.if_exists resume goes on from here")
        elif self.config.checkpoint.export and self.step == self.config.train.steps:
            out = self.folder / "export"
            if self.config.lora.r is not None:
                export_adapters(self.engine, self.config, out)
                self.reporter.say(f"step {self.step}: adapters {out}")
            else:
                dtype = getattr(torch, self.config.checkpoint.export_dtype)
                export_engine(self.engine, out, dtype=dtype, tokenizer=tokenizer_folder(self.config))
                self.reporter.say(f"step {self.step}: Hugging Face model {out}")

    def _one_step(self) -> bool:
        """Whether the run has been told to stop, on any rank."""
        config = self.config
        began = time.perf_counter()
        self.profiler.before(self.step + 1)
        batches = [next(self.loader) for _ in range(config.train.gradient_accumulation)]
        if self.step == 0:
            _draw_mask(self.folder, batches[0], self.world)
        lr = config.optimizer.lr * learning_rate_factor(self.step, config.train.steps, config.schedule)
        self.engine.set_lr(lr)
        result = train_step(self.engine, batches, self.watch.fault)
        self.step += 1
        too_many = self.watch.note(self.step, result.loss, result.grad_norm, result.fault)
        exchange = self.clock.take()
        metrics, stopped = self.meter.measure(
            self.step,
            result,
            batches,
            seconds=time.perf_counter() - began,
            exchange=exchange,
            stop=self.stop.received,
            lr=lr,
            skipped=self.watch.total,
        )
        self.reporter.step(metrics)
        trace = self.profiler.after(self.step, last=stopped or self.step == self.end)
        if trace is not None:
            self.reporter.say(f"step {self.step}: trace {trace}")
        if result.fault is not None:
            self._skipped(batches, result.fault, too_many)
        return stopped

    def _skipped(self, batches: Sequence[Batch], fault: str, too_many: bool) -> None:
        place = self.folder / "faults"
        try:
            faults.save_batches(place, self.step, self.world.rank, batches, fault)
            where = f"its batch is in {place}"
        except (OSError, RuntimeError) as error:
            # A full disk is torch's RuntimeError or an OSError.
            where = f"its batch could not be written ({error})"
        self.reporter.say(f"step {self.step}: skipped, {fault}; {where}")
        if too_many:
            raise TrainingError(
                f"step {self.step}: {fault}, and {self.config.train.max_skipped} of the last 100 steps were skipped "
                f"before it. The weights are the last good step's and the batches are in {place}. Lower "
                "optimizer.lr, lengthen schedule.warmup_steps, look at the data, or raise train.max_skipped."
            )

    def _state(self) -> checkpoint.RunState:
        return checkpoint.RunState(
            step=self.step,
            data=self.loader.state_dict(),
            model=checkpoint.config_of(self.engine.hf_config),
            ranks=self.world.size,
            engine=self.engine.name,
            watch=self.watch.state_dict(),
            tokenizer=tokenizer_folder(self.config),
        )

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return every is not None and (self.step % every == 0 or self.step == self.end)

    def _evaluate(self) -> None:
        if self.config.eval.every is None:
            return
        record = evaluation.evaluate(self.engine, self.config, self.step)
        self.reporter.evaluation(self.step, record)
        if self.world.rank == 0:
            evaluation.draw(self.folder)
        self.reporter.say(f"step {self.step}: held-out loss {record['loss']:.4f} over {record['labels']:,} labels")

    def _tell(self) -> None:
        for line in self.writer.news():
            self.reporter.say(line)


class _Meter:
    """Turns what each rank knows of a step into what is true of all of them."""

    def __init__(self, config: Config, world: World) -> None:
        self.world = world
        model = build(config.model, max_length=config.data.sequence_length)
        self.flops = FlopCount.of(model.causal_lm, model.causal_lm.config)
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        self.peak = peak_tflops(gpu, config.train.precision, config.train.peak_tflops)

    def measure(
        self,
        step: int,
        result: StepResult,
        batches: Sequence[Batch],
        *,
        seconds: float,
        exchange: float,
        stop: bool,
        lr: float,
        skipped: int,
    ) -> tuple[StepMetrics, bool]:
        """The step's metrics, and whether any rank was told to stop. A collective."""
        world = self.world
        # Ranks that share a batch all report it, so it counts that often in every sum.
        sharing = world.size // world.dp_size
        own = [
            sum(b.visible_area for b in batches) / sharing,
            sum(b.num_scores for b in batches) / sharing,
            sum(b.num_tokens for b in batches) / sharing,
            sum(self.flops.of_batch(b) for b in batches) / sharing,
            sum(b.plan.imbalance for b in batches) / (len(batches) * world.size),
            sum(b.plan.received_fraction for b in batches) / (len(batches) * world.size),
            exchange / world.size,
            float(stop),
        ]
        sums = torch.tensor(own, dtype=torch.float64, device=world.device)
        dist.all_reduce(sums)
        area, scores, tokens, flops, imbalance, received, exchange, stops = sums.tolist()
        tflops = flops / seconds / world.size / 1e12
        on_gpu = world.device.type == "cuda"
        metrics = StepMetrics(
            step=step,
            loss=result.loss if math.isfinite(result.loss) else None,
            tokens_per_second=tokens / seconds,
            tokens_per_second_per_gpu=tokens / seconds / world.size,
            tflops_per_gpu=tflops,
            mfu=None if self.peak is None else tflops / self.peak,
            visible_fraction=area / scores,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            lr=lr,
            imbalance=imbalance,
            received_fraction=received,
            exchange_seconds=exchange if world.cp_size > 1 else None,
            labels=result.labels,
            task=result.figures,
            skipped=skipped,
            fault=result.fault,
            seconds=seconds,
            peak_memory_gib=torch.cuda.max_memory_allocated(world.device) / 2**30 if on_gpu else None,
        )
        return metrics, stops > 0


@contextmanager
def _determinism(config: Config) -> Iterator[None]:
    """torch's deterministic algorithms, which attention follows, for as long as the run lasts if it asks for them."""
    if not config.train.deterministic:
        yield
        return
    # Read when cuBLAS makes its first handle.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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
    if resume is None:
        return text
    damaged = "".join(f"\n{why} The one before it is used." for why in resume.damaged.values())
    return f"{text}{damaged}\nresuming from {resume.path} at step {resume.state.step}"
