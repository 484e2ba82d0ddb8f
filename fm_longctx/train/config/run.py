"""The `checkpoint` and `train` sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fm_longctx.train.config.check import at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, under train.folder/checkpoints."""

    every: int | None = None
    """Steps between checkpoints. None: only at the end."""
    at_end: bool = True
    """Write one after the last step."""
    keep: int = 2
    """The newest so many are kept."""
    load: str | None = None
    """A checkpoint folder (step_...) to start from, if train.folder has none of its own to resume from."""

    def __post_init__(self) -> None:
        at_least("checkpoint", 1, every=self.every, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    folder: str = "runs/train"
    """Where config.yaml, metrics.jsonl, mask.png and checkpoints/ go."""
    if_exists: Literal["refuse", "resume", "replace"] = "refuse"
    """What to do if the folder already holds a run: stop; go on from its last checkpoint; or delete that run."""
    steps: int = 100
    """Optimizer steps of the whole run; the schedule spans them."""
    stop_at: int | None = None
    """End after this step, with a checkpoint, as if the job's time were over. None: go on to the end."""
    gradient_accumulation: int = 1
    """Micro-batches in a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations in the forward and backward. Master weights, reductions and Adam are float32."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full: keep each layer's input only, and compute the layer again in the backward."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at once."""
    seed: int = 0
    """Of the initial weights; they do not depend on the number of ranks."""
    log_every: int = 10
    """Steps between printed lines where there is no terminal for a progress bar. metrics.jsonl has every step."""

    def __post_init__(self) -> None:
        at_least(
            "train",
            1,
            steps=self.steps,
            stop_at=self.stop_at,
            gradient_accumulation=self.gradient_accumulation,
            loss_chunk=self.loss_chunk,
            log_every=self.log_every,
        )
        at_least("train", 0, seed=self.seed)
