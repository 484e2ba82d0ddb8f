"""The `eval` section."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fm_longctx.train.config.check import at_least
from fm_longctx.train.config.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Loss on held-out data by position in the document. Packed as training data is; off without `every`."""

    every: int | None = None
    """Steps between evaluations; there is one after the last step too. None: no evaluation."""
    steps: int = 8
    """Micro-batches of each data rank in an evaluation: always the same first ones of the held-out data."""
    path: str | None = None
    """The held-out documents: as data.path, and read as data.source says."""
    pattern: str | None = None
    """Which files of the folder. None: as data.pattern."""
    sequence_length: int | None = None
    """Tokens of a packed sequence. None: as data.sequence_length."""

    def __post_init__(self) -> None:
        at_least("eval", 1, every=self.every, steps=self.steps)
        at_least("eval", 2, sequence_length=self.sequence_length)
        if self.every is not None and self.path is None:
            raise ValueError("eval.every needs eval.path: a text file or a folder that training does not read.")

    def data(self, training: DataConfig) -> DataConfig:
        """The data section of the held-out documents."""
        return replace(
            training,
            source="files" if training.source == "python_stdlib" else training.source,
            path=self.path,
            pattern=self.pattern or training.pattern,
            sequence_length=self.sequence_length or training.sequence_length,
            balance="none",
            lookahead=None,
        )
