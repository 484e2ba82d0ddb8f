"""Whatever Hugging Face `datasets` loads: rows in any order, or a stream of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fm_longctx.data.jsonl import text_of
from fm_longctx.data.sources import found_files

HUB = "hf://datasets/"
"""What a `path` begins with that is meant for the Hugging Face hub, not for this machine."""

SUFFIXES = {
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt", ".txt.gz"),
    "csv": (".csv", ".csv.gz"),
}
"""Formats by their names in `datasets`, and the endings that mean each of them."""


class DatasetTexts:
    """Rows of a `datasets.Dataset`: documents and records, any of them at any time.

    Args:
        dataset: a map-style data set.
        field: the column that holds text, for `read`.
        identity: of which data these are, for the fingerprint.
    """

    def __init__(self, dataset: Any, *, field: str = "text", identity: str) -> None:
        self.dataset, self.field = dataset, field
        self._identity = identity
        if not len(dataset):
            raise ValueError(f"the data set {identity} has no row.")

    @classmethod
    def from_path(
        cls, path: str | Path, *, format: str | None = None, split: str = "train", field: str = "text"
    ) -> DatasetTexts:
        """A file, a folder of files, a folder of `save_to_disk`, or `hf://datasets/NAME`; see `load`."""
        dataset, identity = load(path, format=format, split=split, streaming=False)
        return cls(dataset, field=field, identity=identity)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_bytes(self) -> int:
        """Of the Arrow table, all columns."""
        return int(self.dataset.data.nbytes)

    def record(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        return dict(self.dataset[index])

    def read(self, index: int) -> bytes:
        """The text of a row as UTF-8; a ValueError that names the columns if there is none under `field`."""
        return text_of(self.record(index), self.field, f"row {index} of the data set")

    def fingerprint(self) -> str:
        """32 hexadecimal digits of names, sizes, rows and field."""
        return _digest(self._identity, len(self.dataset), self.field)


class DatasetFeed:
    """Texts of a `datasets.IterableDataset`, one after the other, epoch after epoch without end.

    What it guarantees: texts come in the data set's own order, and after `restore(state)` the next one is that which
    came next after `state()`, in another process too. That is `datasets`' own promise for its `state_dict`. It makes
    none for a data set with a shuffle buffer, whose content is lost: hand in one without.

    Args:
        dataset: an iterable data set.
        field: the column that holds text.
        identity: of which data these are.
    """

    def __init__(self, dataset: Any, *, field: str = "text", identity: str) -> None:
        self.field, self._identity = field, identity
        self._dataset = dataset
        self._start = dataset.state_dict()
        self._epoch, self._seen = 0, 0
        self.restore({"epoch": 0, "rows": 0, "dataset": None})

    @classmethod
    def from_path(
        cls, path: str | Path, *, format: str | None = None, split: str = "train", field: str = "text"
    ) -> DatasetFeed:
        """As `DatasetTexts.from_path`, without loading it first."""
        dataset, identity = load(path, format=format, split=split, streaming=True)
        return cls(dataset, field=field, identity=identity)

    def __next__(self) -> bytes:
        row = next(self._rows, None)
        if row is None:
            if not self._seen:
                raise ValueError(f"the stream {self._identity} has no row.")
            self._epoch += 1
            self._begin(None)
            row = next(self._rows, None)
            if row is None:
                raise ValueError(f"the stream {self._identity} had {self._seen} rows once and has none now.")
            self._seen = 0
        self._fresh = False
        self._seen += 1
        return text_of(row, self.field, f"row {self._seen - 1} of epoch {self._epoch} of the stream")

    def once(self) -> Iterator[bytes]:
        """The texts of one epoch, from its start."""
        self.restore({"epoch": self._epoch, "rows": 0, "dataset": None})
        for index, row in enumerate(self._rows):
            yield text_of(row, self.field, f"row {index} of the stream")

    def state(self) -> dict[str, Any]:
        """Where the next text comes from; plain numbers and words."""
        # An iterator that has given nothing has no state of its own yet.
        dataset = self._loaded if self._fresh else self._dataset.state_dict()
        return {"epoch": self._epoch, "rows": self._seen, "dataset": dataset}

    def restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._seen = int(state["epoch"]), int(state["rows"])
        self._begin(state["dataset"])

    def fingerprint(self) -> str:
        """32 hexadecimal digits of names, sizes and field."""
        return _digest(self._identity, self.field)

    def _begin(self, state: dict[str, Any] | None) -> None:
        self._dataset.set_epoch(self._epoch)
        self._dataset.load_state_dict(state or {**self._start, "epoch": self._epoch})
        self._rows = iter(self._dataset)
        self._loaded, self._fresh = state, True


def load(path: str | Path, *, format: str | None, split: str, streaming: bool) -> tuple[Any, str]:
    """A data set, map-style or iterable, and what identifies its content.

    Args:
        path: a file; a folder with files of one format; a folder that `Dataset.save_to_disk` wrote; or
            `hf://datasets/NAME` for the Hugging Face hub.
        format: json, parquet, arrow, text or csv; by the files' endings if not given.
        split: which split.
        streaming: read as it comes, instead of loading all first.

    Raises:
        ValueError: `datasets` is missing, nothing there, endings that say nothing or several things, or the library
            cannot load it.
    """
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError("data.source: datasets needs the datasets library: pip install datasets.") from error
    text = str(path)
    try:
        if text.startswith(HUB):
            name = text.removeprefix(HUB)
            dataset = datasets.load_dataset(name, split=split, streaming=streaming)
            return dataset, f"{text} {split} {getattr(dataset.info, 'version', None)}"
        root, names = found_files(path, "**/*")
        names.sort()
        identity = f"{split} " + " ".join(f"{name}:{(root / name).stat().st_size}" for name in names)
        if "dataset_dict.json" in names or "state.json" in names:
            dataset = datasets.load_from_disk(str(root))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
            return (dataset.to_iterable_dataset() if streaming else dataset), identity
        format, names = _format_of(root, names, format)
        files = {split: [str((root / name).resolve()) for name in names]}
        return datasets.load_dataset(format, data_files=files, split=split, streaming=streaming), identity
    except ValueError:
        raise
    except Exception as error:  # the library raises what its readers do
        raise ValueError(f"datasets cannot load {text}: {type(error).__name__}: {error}") from error


def _format_of(root: Path, names: list[str], format: str | None) -> tuple[str, list[str]]:
    """The one format of the files, and those of them that have its ending."""
    by_format = {kind: [name for name in names if name.endswith(endings)] for kind, endings in SUFFIXES.items()}
    found = [kind for kind, of_kind in by_format.items() if of_kind]
    if format is None and len(found) == 1:
        format = found[0]
    if format is None:
        what = f"files of several formats ({', '.join(found)})" if found else "no file of a known ending"
        raise ValueError(f"{root} has {what}. Set data.format to one of {', '.join(SUFFIXES)}.")
    # A single file is what the user says it is, whatever its name.
    chosen = names if len(names) == 1 else by_format[format]
    if not chosen:
        raise ValueError(f"{root} holds no {format} file: {len(names)} files, none ends in {SUFFIXES[format][0]}.")
    return format, chosen


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
