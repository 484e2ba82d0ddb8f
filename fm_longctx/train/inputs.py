"""From the config's data section to this rank's batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.data import (
    ByteTokenizer,
    DatasetFeed,
    DatasetTexts,
    Documents,
    FeedStream,
    HuggingFaceTokenizer,
    JsonLines,
    Loader,
    PackedStream,
    TextFiles,
    TokenFiles,
    TokenizedTexts,
    Tokenizer,
)
from fm_longctx.data.documents import Texts
from fm_longctx.train.config import Config, DataConfig
from fm_longctx.train.engines.world import World
from fm_longctx.train.model import huggingface_config
from fm_longctx.train.tasks.inputs import check_records, record_stream
from fm_longctx.train.tasks.stream import RecordStream

# Where torchrun does not say how many ranks a host has.
_GPUS_A_HOST = 8


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the data section names."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    return HuggingFaceTokenizer(config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos)


def texts(config: DataConfig) -> Texts:
    """The texts that the data section names; not with `streaming`, nor with source: tokens, which has none."""
    if config.source == "python_stdlib":
        return TextFiles.python_stdlib(max_bytes=config.max_bytes)
    assert config.path is not None
    if config.source == "files":
        return TextFiles.from_path(config.path, pattern=config.pattern or "**/*", max_bytes=config.max_bytes)
    if config.source == "jsonl":
        return JsonLines.from_path(config.path, pattern=config.pattern or "**/*.jsonl", field=config.text_field)
    assert config.source == "datasets" and not config.streaming
    return DatasetTexts.from_path(config.path, format=config.format, split=config.split, field=config.text_field)


def texts_and_tokenizer(config: DataConfig) -> tuple[Texts, Tokenizer]:
    """Both, for `data.prepare`."""
    return texts(config), make_tokenizer(config)


def feed(config: DataConfig) -> DatasetFeed:
    """The texts of a `streaming` data section, one after the other."""
    assert config.path is not None
    return DatasetFeed.from_path(config.path, format=config.format, split=config.split, field=config.text_field)


def vocabulary(config: Config) -> int:
    """The model's vocabulary, checked against the tokenizer's.

    Raises:
        ValueError: a token could lie outside the embedding.
    """
    rows = int(huggingface_config(config.model, max_length=config.data.sequence_length).vocab_size)
    # Foreign tokens need not be of the tokenizer that the config names; they are checked as they are read.
    if config.data.source != "tokens" and (needed := make_tokenizer(config.data).vocab_size) > rows:
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer} has {needed} tokens and the model's vocabulary only {rows}. Set "
            f"model.vocab_size to at least {needed}."
        )
    return rows


def check(config: Config) -> None:
    """Raise a ValueError where making the stream would, as far as that is quickly known: nothing is tokenized."""
    vocab_size = vocabulary(config)
    if config.task.kind != "pretrain":
        check_records(config)
    elif config.data.source == "tokens":
        _token_files(config.data, vocab_size)
    elif config.data.streaming:
        next(feed(config.data))
    else:
        texts(config.data).read(0)


def documents(config: Config) -> Documents:
    """The documents that the data section names, as tokens; not with `streaming`."""
    vocab_size = vocabulary(config)
    if config.data.source == "tokens":
        return _token_files(config.data, vocab_size)
    cache = Path(config.data.cache).expanduser()
    return TokenizedTexts(*texts_and_tokenizer(config.data), cache=cache)


def make_stream(config: Config) -> PackedStream | FeedStream | RecordStream:
    """The packed sequences that the data section asks for, of documents or of the task's records."""
    data = config.data
    if config.task.kind != "pretrain":
        vocabulary(config)
        return record_stream(config)
    packing = dict(sequence_length=data.sequence_length, seed=data.seed, packing=data.packing, window=data.window)
    if not data.streaming:
        return PackedStream(documents(config), **packing)  # type: ignore[arg-type]
    vocabulary(config)
    return FeedStream(feed(data), make_tokenizer(data), **packing)  # type: ignore[arg-type]


def plan_options(config: Config) -> dict[str, Any]:
    """What `ShardPlan.build` is told: the layout that the config asks for, and for which layer and hosts."""
    shape = huggingface_config(config.model, max_length=config.data.sequence_length)
    tensor = config.parallel.tensor
    heads, kv_heads = (max(1, n // tensor) for n in (shape.num_attention_heads, shape.num_key_value_heads))
    cost = CostModel(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
        element_bytes=4 if config.train.precision == "float32" else 2,
        host_ranks=max(1, int(os.environ.get("LOCAL_WORLD_SIZE", _GPUS_A_HOST)) // tensor),
    )
    return {**config.parallel.plan_options, "cost": cost}


def make_loader(config: Config, world: World) -> Loader:
    """This rank's loader."""
    return Loader(
        make_stream(config),
        batch_size=config.data.batch_size,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        cp_rank=world.cp_rank,
        cp_size=world.cp_size,
        plan_options=plan_options(config),
        accumulation=config.train.gradient_accumulation,
        balance=config.data.balance,
        lookahead=config.data.lookahead,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        copy_to=world.device if world.device.type == "cuda" else None,
    )


def _token_files(config: DataConfig, vocab_size: int) -> TokenFiles:
    assert config.path is not None
    return TokenFiles.from_path(config.path, tokenizer=make_tokenizer(config), vocab_size=vocab_size)
