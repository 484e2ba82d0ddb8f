"""Tokens on disk in Megatron's form, `NAME.bin` and `NAME.idx`, mapped into memory; and, if we made them, `NAME.json`.

    NAME.idx    "MMIDIDX" and two zero bytes, version 1 (uint64), dtype code (uint8), number of sequences S and of
                document bounds D (uint64 each); int32 [S] tokens of each sequence, int64 [S] byte where it begins in
                NAME.bin, int64 [D] the first sequence of each document and at last S. All little-endian.
    NAME.bin    the tokens, nothing else
    NAME.json   which tokenizer and which source they came from

Source of the format: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_longctx.data.sources import found_files
from fm_longctx.data.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SIDECAR_FORMAT = 1


class TokenFiles:
    """Documents that are tokens already. Nothing is loaded but the index.

    Args:
        prefixes: paths without `.bin` and `.idx`, in order; their documents are one after the other.
        tokenizer: what the run names as its tokenizer; compared with what `NAME.json` says, where there is one.
        vocab_size: tokens outside `[0, vocab_size)` are refused when they are read. None: not looked at.

    Raises:
        ValueError: a file is missing, damaged or cut short, not of tokens, or made with another tokenizer.
    """

    def __init__(
        self, prefixes: Sequence[Path], *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.parts = [_Part(prefix) for prefix in prefixes]
        for part in self.parts:
            if tokenizer is not None and part.sidecar is not None:
                _check_tokenizer(part, tokenizer)
        self.counts = np.concatenate([part.counts for part in self.parts])
        self._ends = np.cumsum([len(part.counts) for part in self.parts])
        if not len(self.counts):
            raise ValueError(f"{', '.join(str(p) for p in prefixes)}: no document in any of them.")

    @classmethod
    def from_path(
        cls, path: str | Path, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
    ) -> TokenFiles:
        """NAME (or NAME.bin or NAME.idx), or a folder with several, taken in the sorted order of their names."""
        path = Path(path).expanduser()
        if path.is_dir():
            root, names = found_files(path, "**/*.idx")
            prefixes = [root / name.removesuffix(".idx") for name in sorted(names)]
            if not prefixes:
                raise ValueError(f"{path} holds no .idx file. launch/prepare_data.py makes .bin and .idx files.")
        else:
            prefixes = [prefix_of(path)]
        return cls(prefixes, tokenizer=tokenizer, vocab_size=vocab_size)

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document, in the files' dtype."""
        at = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[at]
        within = index - (int(self._ends[at]) - len(part.counts))
        first = int(part.begins[within])
        tokens: np.ndarray = part.tokens[first + start : first + stop]
        if self.vocab_size is not None and len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"{part.prefix}.bin, document {within}, holds token {low if low < 0 else high}, outside the "
                    f"model's vocabulary of {self.vocab_size}. Set model.vocab_size to the tokenizer's, or take "
                    "the right file."
                )
        return tokens

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the indexes and the sizes; not of where the files lie."""
        return hashlib.blake2b(repr([p.digest for p in self.parts]).encode(), digest_size=16).hexdigest()


def prefix_of(path: Path) -> Path:
    """NAME of NAME, NAME.bin or NAME.idx."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def with_ending(prefix: Path, ending: str) -> Path:
    """NAME.ending; a dot in NAME stays."""
    return prefix.with_name(f"{prefix.name}.{ending}")


class _Part:
    """One pair of files, and its sidecar if it has one."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index, content = with_ending(prefix, "idx"), with_ending(prefix, "bin")
        for path in (index, content):
            if not path.is_file():
                raise ValueError(f"{path} does not exist. Tokens are a pair of files, NAME.bin and NAME.idx.")
        dtype, lengths, pointers, bounds = _read_index(index)
        itemsize = np.dtype(dtype).itemsize
        ends = lengths.astype(np.int64).cumsum()
        if not np.array_equal(pointers, (ends - lengths) * itemsize):
            raise ValueError(f"{index}: its sequences do not lie one after the other; such files are not read.")
        size = int(ends[-1]) * itemsize if len(ends) else 0
        if content.stat().st_size != size:
            raise ValueError(
                f"{content} has {content.stat().st_size} bytes and its index says {size}: one of the two is cut short "
                "or belongs to another."
            )
        edges = np.concatenate([[0], ends])[bounds]
        self.begins, self.counts = edges[:-1], np.diff(edges)
        # numpy maps no empty file.
        self.tokens = np.memmap(content, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
        self.sidecar = read_sidecar(prefix)
        digest = hashlib.blake2b(repr((str(np.dtype(dtype)), size)).encode(), digest_size=16)
        digest.update(self.counts.tobytes())
        self.digest = digest.hexdigest()


def _read_index(path: Path) -> tuple[type, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, sequence lengths int32 `[S]`, pointers int64 `[S]`, document bounds int64 `[D]`."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise ValueError(f"{path} is no index: it has {size} bytes, fewer than its header.")
    raw = np.memmap(path, mode="r")
    magic, version, code, sequences, bounds = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1:
        raise ValueError(f"{path} is no Megatron index of version 1.")
    if code not in DTYPES:
        raise ValueError(f"{path}: dtype code {code} is none of whole numbers; tokens have one of {sorted(DTYPES)}.")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size == expected + sequences and sequences:
        raise ValueError(f"{path} has a mode for each sequence: it is a multimodal data set, which is not read.")
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, and {expected} by its own count: it is damaged.")
    at = HEADER.size
    lengths = raw[at : at + 4 * sequences].view("<i4")
    pointers = raw[at + 4 * sequences : at + 12 * sequences].view("<i8")
    documents = raw[at + 12 * sequences :].view("<i8")
    good = len(documents) and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    if not good or (sequences and int(lengths.min()) < 0):
        raise ValueError(f"{path}: its document bounds or lengths make no sense: it is damaged.")
    return DTYPES[code], np.asarray(lengths), np.asarray(pointers), np.asarray(documents)


def write_index(path: Path, counts: np.ndarray, dtype: type) -> None:
    """The index of documents with so many tokens each, every one a single sequence."""
    code = next(code for code, kind in DTYPES.items() if kind is dtype)
    counts = counts.astype(np.int64)
    if len(counts) and int(counts.max()) >= 2**31:
        raise ValueError(f"a document has {int(counts.max())} tokens; the format allows fewer than 2**31. Split it.")
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(counts), len(counts) + 1))
        file.write(counts.astype("<i4").tobytes())
        file.write(((counts.cumsum() - counts) * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(counts) + 1, dtype="<i8").tobytes())


def read_sidecar(prefix: Path) -> dict[str, Any] | None:
    """What NAME.json says; None if there is none: the files are somebody else's."""
    path = with_ending(prefix, "json")
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != SIDECAR_FORMAT:
            raise ValueError(f"it has format {content['format']}, and this version reads format {SIDECAR_FORMAT}")
        return {name: content[name] for name in ("format", "tokenizer", "tokenizer_fingerprint", "source", "tokens")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path}, which says how the tokens beside it were made: {error!r}.") from error


def _check_tokenizer(part: _Part, tokenizer: Tokenizer) -> None:
    assert part.sidecar is not None
    if part.sidecar["tokenizer_fingerprint"] != tokenizer.fingerprint():
        raise ValueError(
            f"{part.prefix} was made with another tokenizer: {part.sidecar['tokenizer']} there, "
            f"{tokenizer.describe()} here. Set data.tokenizer (and data.add_bos, data.add_eos) as when it was "
            "prepared, or prepare it again."
        )
