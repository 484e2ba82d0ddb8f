"""What a config would run, found out in one process without a process group or storage."""

from __future__ import annotations

from fm_longctx.data import FeedStream, Loader, PackedStream
from fm_longctx.train.config import Config
from fm_longctx.train.inputs import make_stream
from fm_longctx.train.ranks import ranks_started
from fm_longctx.train.tasks.models import build_model
from fm_longctx.train.tasks.stream import RecordStream


def describe(config: Config) -> str:
    """Validate the config for `parallel.ranks` ranks (or as many as were started) and describe the run.

    Builds the model on the meta device and plans the first real batch. Raises a ValueError where training would.
    """
    ranks = config.parallel.ranks or ranks_started()
    config.check_world(ranks)
    data, context = config.parallel.data_ranks(ranks), config.parallel.context
    model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    stream = make_stream(config)
    loader = Loader(
        stream,
        batch_size=config.data.batch_size,
        dp_size=data,
        cp_size=context,
        plan_options=config.parallel.plan_options,
    )
    try:
        batch = loader.make(0)
    finally:
        loader.close()
    per_step = config.data.sequence_length * config.data.batch_size * data * config.train.gradient_accumulation
    shape = model.causal_lm.config
    heads = f"{shape.num_attention_heads}:{shape.num_key_value_heads} heads of {shape.head_dim}"
    gib = parameters * 16 / ranks / 2**30
    return "\n".join(
        (
            f"model       {parameters:,} parameters: {shape.num_hidden_layers} layers x {shape.hidden_size}, {heads}, "
            f"MLP {shape.intermediate_size}, vocabulary {shape.vocab_size}",
            f"mesh        {ranks} ranks = data {data} x context {context}; parameters sharded over all {ranks}",
            f"states      {gib:,.1f} GiB a rank: float32 weights, gradients and two Adam moments",
            f"precision   {config.train.precision}; activation checkpointing {config.train.activation_checkpointing}",
            f"step        {per_step:,} tokens: {config.data.sequence_length:,} a sequence, "
            f"{config.data.sequence_length // context:,} a rank",
            f"data        {_amount(stream, config.train.steps * per_step)}",
            f"first mask  {batch.visible_area / batch.num_scores:.1%} visible; imbalance {batch.plan.imbalance:.3f}; "
            f"receives {batch.plan.received_fraction:.1%} of what an all-gather would",
        )
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
