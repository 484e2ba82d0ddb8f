"""Documents and records from JSON lines, read where they lie by an index of where each line begins."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_longctx.data.sources import found_files


class JsonLines:
    """One JSON object a line, over one file or several in the sorted order of their names. Blank lines are left out.

    The files are read through once at the start, to note where lines begin (16 bytes a line are kept); after that any
    record is one read. Nothing is parsed before it is asked for.

    Args:
        root: the folder the names are relative to.
        names: POSIX-style relative paths.
        field: where a record's text is, for `read`.

    Raises:
        ValueError: no line anywhere, or a compressed file.
    """

    def __init__(self, root: Path, names: Sequence[str], *, field: str = "text") -> None:
        self.root, self.field = root, field
        self.names = tuple(sorted(names))
        digest = hashlib.blake2b(digest_size=16)
        begins, lengths, ends = [], [], []
        total = 0
        for name in self.names:
            if name.endswith((".gz", ".zst", ".bz2", ".xz")):
                raise ValueError(
                    f"{root / name} is compressed, which rules out reading line by line in any order. Decompress it, "
                    "or read it with data.source: datasets."
                )
            begin, length = _lines(root / name)
            begins.append(begin)
            lengths.append(length)
            total += len(begin)
            ends.append(total)
            digest.update(f"{name}\0{(root / name).stat().st_size}\0".encode() + length.tobytes())
        if not total:
            raise ValueError(f"{root} holds no record: {len(self.names)} files matched, none with a line.")
        self._begins, self._lengths = np.concatenate(begins), np.concatenate(lengths)
        self._ends = np.array(ends)
        self._digest = digest.hexdigest()

    @classmethod
    def from_path(cls, path: str | Path, *, pattern: str = "**/*.jsonl", field: str = "text") -> JsonLines:
        """One file, or every file of a folder that matches `pattern` and has no hidden part in its relative path."""
        root, names = found_files(path, pattern)
        return cls(root, names, field=field)

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def num_bytes(self) -> int:
        """Of all lines, as they are in the files."""
        return int(self._lengths.sum())

    def record(self, index: int) -> dict[str, Any]:
        """Record `index`, parsed; a ValueError that names file and byte if it is no JSON object."""
        path = self._path(index)
        begin, length = int(self._begins[index]), int(self._lengths[index])
        try:
            with path.open("rb") as file:
                file.seek(begin)
                content = json.loads(file.read(length))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
        except ValueError as error:
            raise ValueError(f"{path}, the line at byte {begin} (record {index}), is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{path}, the line at byte {begin} (record {index}), must hold an object, got {type(content).__name__}."
            )
        return content

    def read(self, index: int) -> bytes:
        """The text of a record as UTF-8; a ValueError that names the fields there are if it has none under `field`."""
        return text_of(self.record(index), self.field, f"{self._path(index)}, record {index},")

    def fingerprint(self) -> str:
        """32 hexadecimal digits of names, sizes, line lengths and field."""
        return hashlib.blake2b(f"{self._digest}\0{self.field}".encode(), digest_size=16).hexdigest()

    def _path(self, index: int) -> Path:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.root / self.names[int(np.searchsorted(self._ends, index, side="right"))]


def text_of(record: dict[str, Any], field: str, where: str) -> bytes:
    """The text under `field`, as UTF-8; `where` begins the error's sentence."""
    text = record.get(field)
    if not isinstance(text, str):
        found = f"{type(text).__name__} under {field!r}" if field in record else f"the fields {', '.join(record)}"
        raise ValueError(f"{where} has no text: it has {found}. Set data.text_field to the field that holds text.")
    return text.encode("utf-8", errors="surrogatepass")


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where each line that is not blank begins, and its length in bytes; int64."""
    begins, lengths = array("q"), array("q")
    at = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    begins.append(at)
                    lengths.append(len(line))
                at += len(line)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    return np.frombuffer(begins, dtype=np.int64), np.frombuffer(lengths, dtype=np.int64)
