"""What a run is, as frozen dataclasses, one for each section of the YAML.

The string under a field is its documentation; `launch/train.py --help` prints it. How YAML and the command line
become these objects is in `config_load`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fm_longctx.data.tokenizer import ByteTokenizer


def _at_least(section: str, minimum: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{section}.{name} must be at least {minimum}, got {value}.")


def _above_zero(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{section}.{name} must be above 0, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama, in the names of its Hugging Face config; or any local Hugging Face folder."""

    path: str | None = None
    """A local folder with config.json and safetensors: its weights are the start, and the shape below is ignored."""
    vocab_size: int = 258
    """Rows of the embedding; at least the tokenizer's (258 for bytes)."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 384
    """Width inside the MLP."""
    num_hidden_layers: int = 4
    """Decoder layers."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads; they divide the query heads."""
    head_dim: int = 32
    """Size of one head; even."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output projection too."""
    initializer_range: float = 0.02
    """Standard deviation of every initial matrix. Norm weights start at 1."""

    def __post_init__(self) -> None:
        _at_least(
            "model",
            1,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )
        _above_zero(
            "model",
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
        )
        if self.vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least {ByteTokenizer.vocab_size} (256 bytes, BOS, EOS), got "
                f"{self.vocab_size}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_key_value_heads must divide model.num_attention_heads, got {self.num_key_value_heads} and "
                f"{self.num_attention_heads}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads must divide model.hidden_size (transformers asks for it), got "
                f"{self.num_attention_heads} and {self.hidden_size}."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary positions, got {self.head_dim}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is packed."""

    source: Literal["python_stdlib", "files"] = "python_stdlib"
    """python_stdlib: the standard library's own .py files, without its tests. files: what lies at data.path."""
    path: str | None = None
    """A text file, or a folder with one document a file. Only with source: files."""
    pattern: str = "**/*"
    """Which files of the folder, as a glob."""
    max_bytes: int | None = None
    """Leave out files that are longer than this. None: take them all."""
    sequence_length: int = 8192
    """Tokens of a packed sequence, over all its context ranks."""
    batch_size: int = 1
    """Sequences that one data-parallel rank takes in a micro-batch."""
    seed: int = 0
    """Of the order of the documents."""

    def __post_init__(self) -> None:
        _at_least("data", 1, batch_size=self.batch_size, max_bytes=self.max_bytes)
        _at_least("data", 0, seed=self.seed)
        _at_least("data", 2, sequence_length=self.sequence_length)
        if self.source == "files" and self.path is None:
            raise ValueError("data.source: files needs data.path, a text file or a folder of text files.")
        if self.source != "files" and self.path is not None:
            raise ValueError(f"data.path is read only with data.source: files, but data.source is {self.source}.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work: a (data, context) mesh; parameters are sharded over all of it (FSDP2)."""

    context: int = 1
    """Ranks that share one sequence. Must divide the number of ranks; the rest is data parallel."""
    ranks: int | None = None
    """Ranks the job is meant for: another number is refused, and --dry-run plans for it. None: as many as started."""
    strategy: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    """How a sequence is dealt to its context ranks; `launch/plan.py` compares them."""
    chunk_size: int | None = None
    """Tokens in the unit of sharding of a sequence. None: the planner chooses."""
    stages: int | None = None
    """Stages of the exchange, each overlapped with the attention of the one before. None: the planner chooses."""
    head_parallel: int = 1
    """Context ranks that split heads instead of keys (Ulysses). Must divide parallel.context and the query heads."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward and gather them again in its backward (FSDP2; ZeRO-3)."""
    timeout_seconds: int = 600
    """How long a collective may wait for a rank before the job ends with an error."""

    def __post_init__(self) -> None:
        _at_least(
            "parallel",
            1,
            context=self.context,
            ranks=self.ranks,
            chunk_size=self.chunk_size,
            stages=self.stages,
            head_parallel=self.head_parallel,
            timeout_seconds=self.timeout_seconds,
        )
        if self.context % self.head_parallel:
            raise ValueError(
                f"parallel.head_parallel={self.head_parallel} does not divide parallel.context={self.context}. Set it "
                "to a divisor, or to 1 for none."
            )
        if self.ranks is not None:
            self.data_ranks(self.ranks)

    @property
    def plan_options(self) -> dict[str, Any]:
        """What `ShardPlan.build` is told of a sequence's layout."""
        return {
            "strategy": self.strategy,
            "chunk_size": self.chunk_size,
            "num_stages": self.stages,
            "head_parallel": self.head_parallel,
        }

    def data_ranks(self, ranks: int) -> int:
        """Data-parallel ranks among so many; a ValueError if the context ranks do not divide them."""
        if ranks % self.context:
            divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
            raise ValueError(
                f"parallel.context={self.context} does not divide the {ranks} ranks of this job. Set parallel.context "
                f"to one of {divisors}, or start a multiple of {self.context} ranks (torchrun --nproc-per-node)."
            )
        return ranks // self.context


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. Weight decay applies to matrices, not to norm weights."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Per step, times the learning rate."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm, taken over all parameters and ranks. None: not at all."""

    def __post_init__(self) -> None:
        _above_zero("optimizer", lr=self.lr, eps=self.eps)
        _at_least("optimizer", 0, weight_decay=self.weight_decay)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {beta}.")
        if self.clip_norm is not None:
            _above_zero("optimizer", clip_norm=self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of optimizer.lr."""

    kind: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warmup: constant; half a cosine down to the end; or stable, then linear over decay_steps (wsd)."""
    warmup_steps: int = 0
    """Linear rise at the start; the first step has 1 / warmup_steps of the peak."""
    decay_steps: int = 0
    """Steps of the fall at the end, for wsd."""
    final_fraction: float = 0.1
    """The factor that the fall would reach one step past the end."""

    def __post_init__(self) -> None:
        _at_least("schedule", 0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction must be in [0, 1], got {self.final_fraction}.")
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"schedule.decay_steps is the length of wsd's fall: at least 1 with kind: wsd and 0 otherwise, got "
                f"{self.decay_steps} with kind: {self.kind}."
            )


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
        _at_least("checkpoint", 1, every=self.every, keep=self.keep)


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
        _at_least(
            "train",
            1,
            steps=self.steps,
            stop_at=self.stop_at,
            gradient_accumulation=self.gradient_accumulation,
            loss_chunk=self.loss_chunk,
            log_every=self.log_every,
        )
        _at_least("train", 0, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        slopes = self.schedule.warmup_steps + self.schedule.decay_steps
        if slopes > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps is {slopes}, more than train.steps={self.train.steps}."
            )
        if self.data.sequence_length < self.parallel.context:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} leaves some of the {self.parallel.context} context "
                "ranks without a token."
            )

    def check_world(self, ranks: int) -> None:
        """Raise a ValueError unless this config can run on so many ranks and find its files. Needs no group."""
        if self.parallel.ranks is not None and self.parallel.ranks != ranks:
            raise ValueError(
                f"parallel.ranks={self.parallel.ranks} but {ranks} ranks were started. Start that many, or set "
                "parallel.ranks to the number you have."
            )
        self.parallel.data_ranks(ranks)
        for name, path in (("data.path", self.data.path), ("model.path", self.model.path)):
            if path is not None and not Path(path).expanduser().exists():
                raise ValueError(f"{name}={path!r} does not exist on this machine.")
