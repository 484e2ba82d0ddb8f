"""The `data` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fm_longctx.data.hf_datasets import HUB
from fm_longctx.train.config.check import at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is packed."""

    source: Literal["python_stdlib", "files", "jsonl", "datasets", "tokens"] = "python_stdlib"
    """python_stdlib: the standard library's own .py files, without its tests. files: a text file, or a folder with one
    document a file. jsonl: a JSON object a line. datasets: what Hugging Face datasets loads. tokens: .bin and .idx
    files, Megatron's or of launch/prepare_data.py."""
    path: str | None = None
    """Where the source lies: a file or a folder; for tokens also NAME of NAME.bin; for datasets also
    hf://datasets/NAME. Not with python_stdlib."""
    pattern: str | None = None
    """Which files of the folder, as a glob. None: all of them; for jsonl those that end in .jsonl."""
    max_bytes: int | None = None
    """Leave out files that are longer than this; with python_stdlib and files. None: take them all."""
    text_field: str = "text"
    """Where the text is in a record of jsonl or datasets."""
    format: Literal["json", "parquet", "arrow", "text", "csv"] | None = None
    """What the files of datasets are. None: by their endings."""
    split: str = "train"
    """Which split of datasets."""
    streaming: bool = False
    """Read datasets as it comes, on every rank, without loading it or counting its tokens first."""
    tokenizer: str = "bytes"
    """bytes, or a local folder with a Hugging Face tokenizer. With tokens: the one they were made with."""
    add_bos: bool | None = None
    """Begin each document with the tokenizer's BOS. None: if it has one. Not with bytes, which always do."""
    add_eos: bool | None = None
    """End each document with the tokenizer's EOS. None: if it has one. Not with bytes, which always do."""
    cache: str = "~/.cache/fm_longctx"
    """Folder for token counts, which are kept from run to run where counting means tokenizing."""
    sequence_length: int = 8192
    """Tokens of a packed sequence, over all its context ranks."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents one after the other, cut into sequences. best_fit: only documents longer than a sequence are
    cut; the rest of a sequence is padding."""
    window: int = 64
    """Sequences' worth of documents among which best_fit looks. More leaves less padding."""
    balance: Literal["none", "area"] = "none"
    """area: sequences of like attention area share a micro-batch, so that data-parallel ranks wait less for another."""
    lookahead: int | None = None
    """Sequences over all ranks among which balance: area looks, rounded up to whole steps. None: one step's, so that
    each step keeps its sequences."""
    batch_size: int = 1
    """Sequences that one data-parallel rank takes in a micro-batch."""
    workers: int = 1
    """Threads of each rank that make batches: tokens, masks and plans."""
    prefetch: int = 2
    """Batches that each rank makes ahead."""
    seed: int = 0
    """Of the order of the documents."""

    def __post_init__(self) -> None:
        at_least(
            "data",
            1,
            batch_size=self.batch_size,
            max_bytes=self.max_bytes,
            window=self.window,
            lookahead=self.lookahead,
            workers=self.workers,
        )
        at_least("data", 0, seed=self.seed, prefetch=self.prefetch)
        at_least("data", 2, sequence_length=self.sequence_length)
        if self.source == "python_stdlib" and self.path is not None:
            raise ValueError(
                "data.path is not read with data.source: python_stdlib. Set data.source to files, jsonl, datasets or "
                "tokens."
            )
        if self.source != "python_stdlib" and self.path is None:
            raise ValueError(f"data.source: {self.source} needs data.path.")
        self._only("files", "jsonl", pattern=self.pattern)
        self._only("python_stdlib", "files", max_bytes=self.max_bytes)
        self._only("datasets", format=self.format, streaming=self.streaming or None)
        if self.tokenizer == "bytes" and (self.add_bos, self.add_eos) != (None, None):
            raise ValueError(
                "data.add_bos and data.add_eos are for a Hugging Face tokenizer: bytes always have both. Leave them "
                "out, or set data.tokenizer to a folder."
            )
        if self.lookahead is not None and self.balance == "none":
            raise ValueError(f"data.lookahead={self.lookahead} is for data.balance: area, but data.balance is none.")

    def _only(self, *sources: str, **values: object) -> None:
        for name, value in values.items():
            if value is not None and self.source not in sources:
                raise ValueError(
                    f"data.{name} is for data.source: {' or '.join(sources)}, but data.source is {self.source}."
                )

    @property
    def local_paths(self) -> dict[str, str]:
        """What has to be there on this machine before a run, by key; `tokens` looks for its own files."""
        paths = {}
        if self.path is not None and self.source != "tokens" and not self.path.startswith(HUB):
            paths["data.path"] = self.path
        if self.tokenizer != "bytes":
            paths["data.tokenizer"] = self.tokenizer
        return paths
