"""The command line of `launch/prepare_data.py`: a config's data into `.bin` and `.idx`, once for many runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fm_longctx.data.prepare import Prepared, prepare, prepare_stream
from fm_longctx.data.token_files import prefix_of
from fm_longctx.train import config_load, inputs
from fm_longctx.train.config import DataConfig


def main(arguments: Sequence[str], *, usage: str | None) -> int:
    """Run it; the exit code: 0, or 2 if the input was refused, with one `error:` line."""
    parser = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="PATH", required=True, help="a training config; its data section is read")
    parser.add_argument("--out", metavar="NAME", required=True, help="NAME.bin, NAME.idx and NAME.json are written")
    parser.add_argument("--workers", type=int, default=1, help="processes (1); a stream is read by one")
    parser.add_argument("--replace", action="store_true", help="write over what is there")
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = config_load.load(options.config, overrides)
        began = time.perf_counter()
        made = _prepare(config.data, prefix_of(Path(options.out)), options.workers, options.replace)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{made.documents:,} documents, {made.tokens:,} tokens as {made.dtype}, {made.num_bytes / 2**20:,.1f} MiB, in "
        f"{time.perf_counter() - began:,.0f} s. Train on them with --data.source tokens --data.path {made.prefix}"
    )
    return 0


def _prepare(data: DataConfig, out: Path, workers: int, replace: bool) -> Prepared:
    if data.source == "tokens":
        raise ValueError("data.source: tokens is prepared already. Name the source that the tokens come from.")
    if data.streaming:
        if workers != 1:
            raise ValueError(f"a stream is read by one process, got --workers {workers}.")
        feed = inputs.feed(data)
        return prepare_stream(feed.once(), feed.fingerprint(), inputs.make_tokenizer(data), out, replace=replace)
    return prepare(partial(inputs.texts_and_tokenizer, data), out, workers=workers, replace=replace)
