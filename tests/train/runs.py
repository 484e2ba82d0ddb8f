"""A very small run on the CPU, and the launcher's own two calls on a rank; shared by the tests of what a run gives."""

import json
from pathlib import Path

from fm_longctx.train import config_load
from fm_longctx.train.loop import run
from fm_longctx.train.ranks import ranks_started
from fm_longctx.train.start import prepare

BASE = {
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_hidden_layers": 2,
    "model.head_dim": 8,
    "data.sequence_length": 128,
    "data.max_bytes": 300,
    "parallel.context": 2,
    "parallel.chunk_size": 8,
    "optimizer.lr": 0.01,
    "train.steps": 4,
    "train.device": "cpu",
    "train.if_exists": "resume",
}


def config_of(folder, **changes):
    return config_load.build(BASE | {"train.folder": str(folder)} | changes)


def train_here(folder, **changes):
    """On this rank of a pool."""
    config = config_of(folder, **changes)
    run(config, prepare(config, ranks_started()))


def lines_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]
