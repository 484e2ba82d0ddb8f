"""Loss on held-out data by position in the document: whether a longer context helps, and how far in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx.data import IGNORED
from fm_longctx.train.config import Config
from fm_longctx.train.engines import Engine
from fm_longctx.train.inputs import make_loader

# Curves in the picture: the first evaluation, the last one, and some between.
_CURVES = 5


def evaluate(engine: Engine, config: Config, step: int) -> dict[str, Any]:
    """A line of eval.jsonl, the same on every rank: the loss over the held-out data, whole and in bins of positions.

    Bin b holds the labels that are predicted from positions `[2^b - 1, 2^(b+1) - 2]` of their documents, so from 2^b to
    2^(b+1) - 1 tokens that came before. Every label weighs the same. A collective.
    """
    world = engine.world
    loader = make_loader(replace(config, data=config.eval.data(config.data)), world)
    bins = num_bins(config.eval.data(config.data).sequence_length)
    sums = torch.zeros(2, bins, dtype=torch.float64, device=world.device)
    try:
        for _ in range(config.eval.steps):
            batch = next(loader)
            losses = engine.token_losses(batch)
            labels = batch.labels.to(world.device) != IGNORED
            add_(sums, losses[labels], batch.positions.to(world.device)[labels])
    finally:
        loader.close()
    # Ranks that hold the same part of a batch count it that often; the quotients do not mind.
    dist.all_reduce(sums)
    return record(step, sums / world.copies)


def num_bins(length: int) -> int:
    """Bins that positions below `length` fall into.

    >>> [num_bins(n) for n in (1, 2, 3, 4, 7, 8)]
    [1, 2, 2, 3, 3, 4]
    """
    return length.bit_length()


def add_(sums: Tensor, losses: Tensor, positions: Tensor) -> None:
    """Add losses and counts, `[2, bins]`, of labels at these positions, in place."""
    # Exact for any position: float64 holds it, and frexp gives the exponent without rounding.
    bins = torch.frexp((positions + 1).double()).exponent.long() - 1
    sums[0].index_add_(0, bins, losses.double())
    sums[1].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float64))


def record(step: int, sums: Tensor) -> dict[str, Any]:
    """What eval.jsonl says of the sums of losses and counts, `[2, bins]`; bins without a label are left out."""
    total, count = sums.sum(1).tolist()
    bins = [
        {
            "first": 2**b - 1,
            "last": 2 ** (b + 1) - 2,
            "labels": round(n),
            "loss": loss / n,
            "perplexity": _perplexity(loss / n),
        }
        for b, (loss, n) in enumerate(sums.T.tolist())
        if n
    ]
    mean = total / count
    return {"step": step, "labels": round(count), "loss": mean, "perplexity": _perplexity(mean), "positions": bins}


def draw(folder: Path) -> Path:
    """Perplexity over position of the evaluations in eval.jsonl, as eval.png of the run folder."""
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    shown = sorted({round(i * (len(records) - 1) / max(1, _CURVES - 1)) for i in range(_CURVES)})
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    colours = plt.get_cmap("viridis")
    for place, index in enumerate(shown):
        one = records[index]
        # The middle of a bin, on the logarithmic axis, in tokens that the label was predicted from.
        tokens = [math.sqrt((b["first"] + 1) * (b["last"] + 1)) for b in one["positions"]]
        axes.plot(
            tokens,
            [b["perplexity"] for b in one["positions"]],
            marker="o",
            markersize=3,
            color=colours(place / max(1, len(shown) - 1) * 0.85),
            label=f"step {one['step']}: {one['perplexity']:.3g}",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens of the document read so far", ylabel="perplexity")
    axes.legend(title="over all positions", frameon=False)
    axes.grid(alpha=0.3, which="both")
    path = folder / "eval.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _perplexity(loss: float) -> float | None:
    """exp(loss); None where that is more than a float holds, or nothing."""
    try:
        value = math.exp(loss)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None
