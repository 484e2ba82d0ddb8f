"""The `data` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fm_longctx.train.config.check import at_least


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
        at_least("data", 1, batch_size=self.batch_size, max_bytes=self.max_bytes)
        at_least("data", 0, seed=self.seed)
        at_least("data", 2, sequence_length=self.sequence_length)
        if self.source == "files" and self.path is None:
            raise ValueError("data.source: files needs data.path, a text file or a folder of text files.")
        if self.source != "files" and self.path is not None:
            raise ValueError(f"data.path is read only with data.source: files, but data.source is {self.source}.")
