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
    precision: Literal["float32", "bfloat16", "bfloat16_stochastic"] = "float32"
    """bfloat16: of parameters and activations in the forward and backward; master weights, reductions and Adam are
    float32. bfloat16_stochastic: master weights and Adam's moments are bfloat16 too, and updates are rounded up or down
    at random in proportion, so that small ones count (torchao's AdamW): 8 bytes a parameter instead of 16."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """full: keep each layer's input only, and compute the layer again in the backward. selective: keep attention's
    output, LSE and received keys as well, so that neither attention nor its exchange is repeated."""
    activation_offload: bool = False
    """What the checkpoints keep waits in the host's memory. Only with full or selective."""
    mlp_chunk: int | None = None
    """Tokens whose MLP exists at once; each such chunk is computed again in the backward. None: all of them."""
    compile: bool = False
    """torch.compile the norms and MLPs of the layers: faster, and less memory; the first steps take a minute or so."""
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
            mlp_chunk=self.mlp_chunk,
            loss_chunk=self.loss_chunk,
            log_every=self.log_every,
        )
        at_least("train", 0, seed=self.seed)
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "train.activation_offload moves what activation checkpoints keep, but train.activation_checkpointing "
                "is none. Set it to selective or full."
            )
