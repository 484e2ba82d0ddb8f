"""From the config's data section to this rank's batches."""

from __future__ import annotations

from fm_longctx.data import ByteTokenizer, Loader, PackedStream, TextFiles
from fm_longctx.train.config import Config, DataConfig
from fm_longctx.train.engines.world import World


def documents(config: DataConfig) -> TextFiles:
    """The documents that the data section names."""
    if config.source == "python_stdlib":
        return TextFiles.python_stdlib(max_bytes=config.max_bytes)
    assert config.path is not None
    return TextFiles.from_path(config.path, pattern=config.pattern, max_bytes=config.max_bytes)


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
