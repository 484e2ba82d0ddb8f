"""What a run is, as frozen dataclasses, one for each section of the YAML.

The string under a field is its documentation; `launch/train.py --help` prints it. How YAML and the command line
become these objects is in `config_load`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fm_longctx.data import ByteTokenizer
from fm_longctx.train.config.data import DataConfig
from fm_longctx.train.config.engine import check_engine
from fm_longctx.train.config.evaluation import EvalConfig
from fm_longctx.train.config.log import LogConfig
from fm_longctx.train.config.model import ModelConfig
from fm_longctx.train.config.optimization import OptimizerConfig, ScheduleConfig
from fm_longctx.train.config.parallel import ParallelConfig
from fm_longctx.train.config.run import CheckpointConfig, TrainConfig
from fm_longctx.train.config.task import LoraConfig, TaskConfig, check_task

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.eval.every is not None:
            self.eval.data(self.data)
        slopes = self.schedule.warmup_steps + self.schedule.decay_steps
        if slopes > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps is {slopes}, more than train.steps={self.train.steps}."
            )
        alone = self.data.lookahead is None and self.data.batch_size == self.train.gradient_accumulation == 1
        if self.data.balance == "area" and alone:
            raise ValueError(
                "data.balance: area has nothing to balance in a step of one sequence a rank. Set data.lookahead to "
                "several times the number of data ranks, or train.gradient_accumulation above 1."
            )
        # Other tokenizers are asked when they are loaded.
        in_bytes = self.data.tokenizer == "bytes" and self.data.source != "tokens" and self.model.path is None
        if in_bytes and self.model.vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least {ByteTokenizer.vocab_size} (256 bytes, BOS, EOS), got "
                f"{self.model.vocab_size}."
            )
        if self.data.sequence_length < self.parallel.context:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} leaves some of the {self.parallel.context} context "
                "ranks without a token."
            )
        check_engine(self.parallel, self.train)

        check_task(self)

    def check_world(self, ranks: int) -> None:
        """Raise a ValueError unless this config can run on so many ranks and find its files. Needs no group."""
        if self.parallel.ranks is not None and self.parallel.ranks != ranks:
            raise ValueError(
                f"parallel.ranks={self.parallel.ranks} but {ranks} ranks were started. Start that many, or set "
                "parallel.ranks to the number you have."
            )
        self.parallel.data_ranks(ranks)
        paths = self.data.local_paths | ({} if self.model.path is None else {"model.path": self.model.path})
        if self.eval.every is not None and "data.path" in (held_out := self.eval.data(self.data).local_paths):
            paths = paths | {"eval.path": held_out["data.path"]}
        for name, path in paths.items():
            if not Path(path).expanduser().exists():
                raise ValueError(f"{name}={path!r} does not exist on this machine.")
