"""What a config would run, found out in one process without a process group, a GPU or storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.plan import ShardPlan
from fm_longctx.data import Batch, FeedStream, Loader, PackedStream
from fm_longctx.train.config import Config
from fm_longctx.train.engines.tensor_parallel import check_tensor_parallel
from fm_longctx.train.estimate import GIB, Setup, Shape, step_flops
from fm_longctx.train.estimate_memory import Memory, memory
from fm_longctx.train.estimate_time import (
    GPUS,
    NARROW,
    Attention,
    Gpu,
    StepTime,
    attention_alone,
    fits,
    mfu,
    offload_seconds,
    sharding_bytes,
    step_time,
)
from fm_longctx.train.inputs import make_stream, plan_options
from fm_longctx.train.ranks import ranks_started
from fm_longctx.train.tasks.models import build_model
from fm_longctx.train.tasks.stream import RecordStream

# Micro-batches that are packed and planned. Each costs what a step of the loader costs.
SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Real micro-batches: what of them the estimate needs. Means, unless they say otherwise."""

    batches: int
    area: float
    """Visible scores of one head, in the sequences of one data rank's micro-batch."""
    visible: float
    """Their share of all scores."""
    imbalance: float
    """Of the context ranks: largest over mean area."""
    received_fraction: float
    received: float
    """Tokens whose keys a rank receives, over all stages: the rank and batch that receive most."""
    data_imbalance: float
    """Of the data ranks: largest over mean area, were each to have one of the batches; 1 if data.balance evens them."""
    attention: Attention
    """Of one layer on the slowest rank."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a dry run finds; `str` of it is the report."""

    config: Config
    gpu: Gpu
    ranks: int
    shape: Shape
    setup: Setup
    sample: Sample
    memory: Memory
    seconds: StepTime
    step_tokens: int
    """Of one optimizer step, over all ranks."""
    lines: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of each rank."""
        return self.step_tokens / self.seconds.total / self.ranks

    @property
    def fits(self) -> bool:
        """Whether the peak fits on the GPU."""
        return fits(self.memory.peak, self.gpu)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def describe(config: Config, gpu: str = "h100") -> str:
    """The report of `estimate`."""
    return str(estimate(config, gpu))


def estimate(config: Config, gpu: str = "h100", *, samples: int = SAMPLES) -> Estimate:
    """Validate the config for its ranks and say what the run would take.

    Its ranks are `parallel.ranks`; without it as many as were started, or, where none were, one sequence's.

    Builds the model on the meta device, packs and plans real batches, and estimates memory and time from them.

    Args:
        gpu: one of `GPUS`.
        samples: micro-batches to pack and plan.

    Raises:
        ValueError: where training would raise one, or an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}.")
    card = GPUS[gpu]
    started = ranks_started()
    ranks = config.parallel.ranks or (started if started > 1 else config.parallel.context * config.parallel.tensor)
    config.check_world(ranks)
    data = config.parallel.data_ranks(ranks)
    model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    whole = replace(Shape.of(model.causal_lm.config), head=config.task.kind != "reward")
    parallel = config.parallel
    if parallel.tensor > 1:
        check_tensor_parallel(model.causal_lm.config, parallel.tensor)
    shape = whole.over(parallel.tensor)
    stream = make_stream(config)
    sample = _sample(config, stream, data, shape, card, samples)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    setup = _setup(config, ranks, sample, None if trained == parameters else trained)
    found, seconds = memory(shape, setup), step_time(shape, setup, card, sample.attention)
    head: tuple[str, ...] = (
        f"model       {parameters:,} parameters: {model.causal_lm.config.model_type}, {whole.layers} layers x "
        f"{whole.hidden}, {whole.heads}:{whole.kv_heads} heads of {whole.head_dim}, MLP {whole.intermediate}, "
        f"vocabulary {whole.vocabulary}",
        f"mesh        {ranks} ranks = data {data} x context {parallel.context} x tensor {parallel.tensor}; parameters "
        f"sharded over {setup.ranks}" + (f", {parallel.replicate} replicas" if parallel.replicate > 1 else ""),
        f"data        {_amount(stream, config.train.steps * _step_tokens(config, data))}",
    )
    if parallel.engine != "fsdp":
        head = (*head, f"engine      {parallel.engine}: memory and time below are those of fsdp, which differ from its")
    if setup.trained is not None or setup.reference != "none":
        head = (*head, f"task        {_task(config, setup, parameters)}")
    lines = (
        *head,
        *_work(config, whole, setup, sample, data, ranks, card, seconds),
        *_memory(config, found, setup, card),
    )
    return Estimate(
        config=config,
        gpu=card,
        ranks=ranks,
        shape=shape,
        setup=setup,
        sample=sample,
        memory=found,
        seconds=seconds,
        step_tokens=_step_tokens(config, data),
        lines=lines,
    )


def _amount(stream: PackedStream | FeedStream | RecordStream, tokens: int) -> str:
    if isinstance(stream, FeedStream):
        return "a stream, whose length is not known"
    parts = (
        f"{len(stream):,} records"
        if isinstance(stream, RecordStream)
        else f"{len(stream.documents.counts):,} documents"
    )
    return f"{parts}, {stream.epoch_tokens:,} tokens an epoch; the run is {tokens / stream.epoch_tokens:,.1f} epochs"


def _step_tokens(config: Config, data: int) -> int:
    return config.data.sequence_length * config.data.batch_size * data * config.train.gradient_accumulation


def _task(config: Config, setup: Setup, parameters: int) -> str:
    """What trains of the model, and what reads beside it."""
    references = {
        "none": "",
        "copy": "; a frozen copy of the model reads every batch before it",
        "same": "; without its adapters the model reads every batch once more",
    }
    trains = parameters if setup.trained is None else setup.trained
    return f"{config.task.kind}: {trains:,} of {parameters:,} parameters train{references[setup.reference]}"


def _setup(config: Config, ranks: int, sample: Sample, trained: int | None) -> Setup:
    compares = config.task.kind == "dpo" and config.task.reference != "records"
    reference = "none" if not compares else "copy" if config.lora.r is None else "same"
    train, context = config.train, config.parallel.context
    return Setup(
        tokens=-(-config.data.sequence_length // context) * config.data.batch_size,
        ranks=ranks // (config.parallel.replicate * config.parallel.tensor),
        replicas=config.parallel.replicate,
        tensor=config.parallel.tensor,
        precision=train.precision,
        checkpointing=train.activation_checkpointing,
        offload=train.activation_offload,
        mlp_chunk=train.mlp_chunk,
        mlp_kept=train.mlp_kept,
        compile=train.compile,
        loss_chunk=train.loss_chunk,
        received=sample.received,
        over_ranks=context > 1,
        accumulation=train.gradient_accumulation,
        trained=trained,
        reference=reference,  # type: ignore[arg-type]
    )


def _sample(config: Config, stream: Any, data: int, shape: Shape, gpu: Gpu, samples: int) -> Sample:
    """Pack and plan a few micro-batches, as the first data ranks would."""
    context = config.parallel.context
    loader = Loader(
        stream,
        batch_size=config.data.batch_size,
        dp_size=1,
        cp_size=context,
        plan_options=plan_options(config),
    )
    try:
        batches = [loader.make(i * config.data.batch_size) for i in range(samples)]
    finally:
        loader.close()
    areas = [batch.visible_area for batch in batches]
    # Data ranks wait for the one with the largest area, unless those of a micro-batch are made alike.
    unlike = data > 1 and config.data.balance == "none"
    over_data = max(areas) / _mean(areas) if unlike else 1.0
    timed = [_attention(batch, config, shape, gpu) for batch in batches]
    slowest = max(timed, key=lambda a: a.forward + a.backward) if unlike else None
    return Sample(
        batches=samples,
        area=_mean(areas),
        visible=_mean([batch.visible_area / batch.num_scores for batch in batches]),
        imbalance=_mean([batch.plan.imbalance for batch in batches]),
        received_fraction=_mean([batch.plan.received_fraction for batch in batches]),
        received=max(_received(batch.plan) for batch in batches) if context > 1 else 0.0,
        data_imbalance=over_data,
        attention=slowest or Attention(**{name: _mean([getattr(a, name) for a in timed]) for name in _FIELDS}),
    )


_FIELDS = ("forward", "backward", "forward_wait", "backward_wait")


def _attention(batch: Batch, config: Config, shape: Shape, gpu: Gpu) -> Attention:
    if config.parallel.context == 1:
        return attention_alone(shape, gpu, batch.visible_area)
    forward_rate, backward_rate = gpu.attention_rates(shape.head_dim)
    cost = CostModel(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        element_bytes=4 if config.train.precision == "float32" else 2,
        forward_flops=forward_rate,
        backward_flops=backward_rate,
        bandwidth=gpu.link,
        host_bandwidth=gpu.node_link,
        host_ranks=max(1, 8 // config.parallel.tensor),
        memory_bandwidth=gpu.bandwidth,
    )
    report = replace(batch.plan, cost=cost).report()
    forward, backward = (int(p.total.argmax()) for p in (report.forward, report.backward))
    return Attention(
        forward=float(report.forward.compute[forward]),
        backward=float(report.backward.compute[backward]),
        forward_wait=float(report.forward.total[forward] - report.forward.compute[forward]),
        backward_wait=float(report.backward.total[backward] - report.backward.compute[backward]),
    )


def _received(plan: ShardPlan) -> float:
    """Tokens whose keys and values the rank that receives most gets, with all their heads."""
    report = plan.report()
    return float(report.received.sum(1).max()) / plan.cost.forward_key_bytes


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)


def _work(
    config: Config, shape: Shape, setup: Setup, sample: Sample, data: int, ranks: int, gpu: Gpu, seconds: StepTime
) -> tuple[str, ...]:
    """What a step computes, sends and takes. `shape` is the whole model's."""
    part = shape.over(setup.tensor)
    accumulation = config.train.gradient_accumulation
    tokens, area = _step_tokens(config, data), sample.area * data * accumulation
    flops = step_flops(shape, tokens, area)
    share = mfu(shape, gpu, tokens=tokens, area=area, gpus=ranks, seconds=seconds.total)
    parts = {
        "matrices": seconds.matrices,
        "attention": seconds.attention,
        "memory-bound passes": seconds.passes,
        "waiting for keys": seconds.exchange,
        "tensor ranks' sums": seconds.tensor,
        "waiting for weights": seconds.sharding,
    }
    named = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    key_bytes = 2 * part.kv * setup.element * sample.received
    attention = 3 * 4.0 * shape.q * shape.layers * area / flops
    unlike = sample.data_imbalance > 1.1
    lines = [
        f"masks       of {sample.batches} sampled micro-batches: {sample.visible:.1%} visible; imbalance over context "
        f"ranks {sample.imbalance:.3f}, over data ranks {sample.data_imbalance:.2f}"
        + (" (all wait for the heaviest; data.balance and data.lookahead even them)" if unlike else ""),
        f"step        {tokens:,} tokens: {config.data.sequence_length:,} a sequence, {setup.tokens:,} a rank and "
        f"micro-batch, {accumulation} micro-batch(es)",
        f"FLOPs       {flops / ranks / 1e15:,.2f} PFLOP a GPU and step: three forwards over the real area, "
        f"{attention:.0%} of it attention",
        f"exchange    keys of {sample.received:,.0f} tokens a rank at most, {sample.received_fraction:.1%} of an "
        f"all-gather: {_size(key_bytes)} a layer and forward, {_size(shape.layers * 3 * key_bytes)} a micro-batch with "
        "gradients",
        f"sharding    {_size(sharding_bytes(part, setup))} of weights and gradients a rank and step",
        f"time        {seconds.total:.2f} s a step on {gpu.name}, estimated: {named}",
        f"speed       {tokens / seconds.total / ranks:,.0f} tokens/s a GPU, MFU {share:.1%}, both estimated",
        f"rates       attention {gpu.attention_forward / 1e12:.0f} and {gpu.attention_backward / 1e12:.0f} TFLOP/s "
        f"({gpu.attention_source}), {NARROW[0]} and {NARROW[1]} of it below D 128; assumed: matrices at "
        f"{gpu.matmul:.0%} of {gpu.peak / 1e12:.0f} TFLOP/s, {gpu.node_link / 1e9:.0f} GB/s in a "
        f"node, {gpu.link / 1e9:.0f} between nodes",
    ]
    moving = offload_seconds(part, setup, gpu)
    if moving:
        lines.append(
            f"offload     {moving:.2f} s of copies to the host and as many back, assumed {gpu.host_link / 1e9:.0f} "
            "GB/s; beside the computation, not counted above"
        )
    return tuple(lines)


def _memory(config: Config, found: Memory, setup: Setup, gpu: Gpu) -> tuple[str, ...]:
    """Memory by kind, and whether it fits."""
    train = config.train
    kinds = {
        "parameters": found.parameters,
        "reference": found.reference,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "weights gathered": found.gathered,
        "gradients unreduced": found.unreduced,
        "activations kept": found.activations,
        "keys received": found.received,
        "within a layer": found.within_layer,
        "loss and logits": found.loss,
    }
    options = [train.precision, f"checkpoints {train.activation_checkpointing}"]
    options += ["offloaded"] if train.activation_offload else []
    options += [f"MLP by {train.mlp_chunk}"] if train.mlp_chunk is not None else []
    options += [f"MLPs of {train.mlp_kept} layers kept"] if train.mlp_kept else []
    options += ["compiled"] if train.compile else []
    options += [f"loss by {train.loss_chunk}"]
    lines = [f"memory      GiB a rank, estimated; {', '.join(options)}"]
    lines += [f"  {name:<22}{value / GIB:>8.1f}" for name, value in kinds.items() if value or name != "reference"]
    if found.host:
        lines.append(f"  {'on the host':<22}{found.host / GIB:>8.1f}")
    room = gpu.usable * gpu.memory / GIB
    lines.append(f"  {'peak':<22}{found.peak / GIB:>8.1f}  in {found.moment}; not all kinds exist at once")
    if fits(found.peak, gpu):
        lines.append(f"fits        {found.peak / GIB:.1f} of the {room:.1f} GiB that tensors can have on {gpu.name}")
    else:
        lines.append(
            f"DOES NOT FIT: {found.peak / GIB:.1f} GiB, and {gpu.name} has {room:.1f} for tensors. "
            + _advice(config, found)
        )
    return tuple(lines)


def _advice(config: Config, found: Memory) -> str:
    """What would help most."""
    train = config.train
    states = found.parameters + found.reference + found.gradients + found.optimizer
    kept = found.activations + found.received
    if kept >= max(states, found.within_layer):
        if train.activation_checkpointing == "none":
            return "Set train.activation_checkpointing to selective or full."
        if train.mlp_kept:
            return "Lower train.mlp_kept."
        if not train.activation_offload:
            return "Set train.activation_offload, or train.activation_checkpointing to full."
        return "Raise parallel.context."
    if found.within_layer >= states:
        if train.mlp_chunk is None:
            return "Set train.mlp_chunk to 8192 or so, or raise parallel.context."
        return "Raise parallel.context: each rank has fewer tokens."
    if train.precision != "bfloat16_stochastic":
        return "Take more GPUs, or set train.precision to bfloat16_stochastic."
    return "Take more GPUs, or one with more memory (--gpu h200)."


def _size(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:.0f} B"
