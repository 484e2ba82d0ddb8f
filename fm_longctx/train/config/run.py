"""The `checkpoint` and `train` sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fm_longctx.train.config.check import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, under train.folder/checkpoints."""

    every: int | None = None
    """Steps between checkpoints. None: only at the end."""
    at_end: bool = True
    """Write one after the last step."""
    keep: int = 2
    """The newest so many are kept."""
    asynchronous: bool = True
    """Copy to the CPU's memory and write from there while training goes on. false: training waits for the disk."""
    load: str | None = None
    """A checkpoint folder (step_...) to start from, if train.folder has none of its own to resume from."""
    export: bool = False
    """After the last step, write the model in Hugging Face's form to train.folder/export."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported weights."""

    def __post_init__(self) -> None:
        at_least("checkpoint", 1, every=self.every, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    folder: str = "runs/train"
    """The run folder: config.yaml, metrics.jsonl, checkpoints/ and more; docs/training.md lists them."""
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
    mlp_kept: int = 0
    """With full or selective: layers, the last so many, that keep what their MLP's backward needs as well, so that its
    products, most of what a checkpoint would repeat, are not repeated. For where there is memory to spare."""
    compile: bool = False
    """torch.compile the layers but for attention: faster, and less memory; the first steps take a minute or so."""
    loss_chunk: int = 4096
    """Tokens whose logits exist at once."""
    seed: int = 0
    """Of the initial weights, which do not depend on the number of ranks, and of any dropout, which does."""
    deterministic: bool = False
    """Repeat every loss bit for bit on the same ranks: torch.use_deterministic_algorithms, and attention's own."""
    spike_factor: float | None = None
    """Skip a step whose loss or gradient norm is above this many times its running median. None: only if not finite."""
    max_skipped: int = 3
    """Steps that may be skipped within the last 100; one more ends the run. Each one's batch is saved in faults/."""
    profile_steps: str | None = None
    """Steps to trace on rank 0, as "10" or "10-12"; the trace goes to profile/. None: no trace."""
    memory_history: bool = False
    """Note every allocation on the GPU, so that the snapshot of an out-of-memory error says who holds what."""
    peak_tflops: float | None = None
    """What MFU is a share of, for one GPU. None: its dense bfloat16 peak, where that is known and used."""
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
        at_least("train", 0, seed=self.seed, max_skipped=self.max_skipped, mlp_kept=self.mlp_kept)
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "train.activation_offload moves what activation checkpoints keep, but train.activation_checkpointing "
                "is none. Set it to selective or full."
            )
        if self.mlp_kept and self.activation_checkpointing == "none":
            raise ValueError("train.mlp_kept is for checkpoints; without them everything is kept. Set it to 0.")
        if self.mlp_kept and (self.mlp_chunk is not None or self.activation_offload):
            raise ValueError(
                "train.mlp_kept spends memory that train.mlp_chunk and train.activation_offload save. Set it to 0, or "
                "mlp_chunk to null and activation_offload to false."
            )
        if self.peak_tflops is not None:
            above_zero("train", peak_tflops=self.peak_tflops)
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"train.spike_factor must be above 1, got {self.spike_factor}.")
        if self.profile_steps is not None:
            last = self.profiled[-1]
            if last > self.steps:
                raise ValueError(f"train.profile_steps ends at {last}, after the last of train.steps={self.steps}.")

    @property
    def profiled(self) -> range:
        """The steps of profile_steps; empty if there are none."""
        if self.profile_steps is None:
            return range(0)
        first, _, last = self.profile_steps.partition("-")
        try:
            steps = range(int(first), int(last or first) + 1)
        except ValueError:
            steps = range(0)
        if not steps or steps[0] < 1:
            raise ValueError(f'train.profile_steps must look like "10" or "10-12", got {self.profile_steps!r}.')
        return steps
