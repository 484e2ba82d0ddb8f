"""From a config to the records of its task."""

from __future__ import annotations

import logging

from fm_longctx.data import JsonLines
from fm_longctx.train.config import Config
from fm_longctx.train.tasks.encoder import ByteEncoder, Encoder, HuggingFaceEncoder
from fm_longctx.train.tasks.records import parser
from fm_longctx.train.tasks.stream import RecordStream

log = logging.getLogger(__name__)


def record_stream(config: Config) -> RecordStream:
    """The records that the data section names, packed; see `RecordStream` for what is refused."""
    encoder = make_encoder(config)
    stream = RecordStream(
        _lines(config),
        parser(config.task, encoder),
        rows="ends" if config.task.kind == "reward" else "labels",
        sequence_length=config.data.sequence_length,
        seed=config.data.seed,
        too_long=config.task.too_long,
        identity=f"{config.task.kind} {encoder.fingerprint()}",
    )
    if stream.dropped:
        log.warning(
            "%s of %s records take more than %s tokens and are left out (task.too_long: drop)",
            stream.dropped,
            stream.dropped + len(stream),
            config.data.sequence_length,
        )
    return stream


def check_records(config: Config) -> None:
    """Raise a ValueError where the first record is refused; the others are read when the stream is made."""
    lines = _lines(config)
    try:
        parser(config.task, make_encoder(config))(lines.record(0))
    except ValueError as error:
        raise ValueError(f"record 0 of {lines.root}: {error}") from error


def make_encoder(config: Config) -> Encoder:
    """The data section's tokenizer, for records."""
    if config.data.tokenizer == "bytes":
        return ByteEncoder()
    return HuggingFaceEncoder.from_folder(config.data.tokenizer)


def _lines(config: Config) -> JsonLines:
    assert config.data.path is not None
    return JsonLines.from_path(config.data.path, pattern=config.data.pattern or "**/*.jsonl")
