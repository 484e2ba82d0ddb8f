"""Tokenize once, for many runs: texts into `NAME.bin`, `NAME.idx` and `NAME.json`; see `token_files`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fm_longctx.data.documents import Texts
from fm_longctx.data.token_files import SIDECAR_FORMAT, with_ending, write_index
from fm_longctx.data.tokenizer import Tokenizer

_ENDINGS = ("bin", "idx", "json")
_PARTS_A_WORKER = 4

Open = Callable[[], tuple[Texts, Tokenizer]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was written."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str
    num_bytes: int
    """Of NAME.bin."""


def prepare(open_source: Open, out: Path, *, workers: int = 1, replace: bool = False) -> Prepared:
    """Tokenize every text, in order, into `out`.bin and `out`.idx, and say in `out`.json how that was done.

    The files are the same whatever the number of workers. They are written beside their place and moved there when
    whole, the json last.

    Args:
        open_source: gives the texts and the tokenizer; called in each worker, so a module's function or a partial.
        out: the path without ending.
        workers: processes.
        replace: write over what is there.

    Raises:
        ValueError: something is there already, a bad text, or a source and tokenizer without any token.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    source, tokenizer = open_source()
    with _Writer(out, tokenizer, replace=replace) as writer:
        bounds = np.linspace(0, len(source), min(len(source), workers * _PARTS_A_WORKER) + 1).astype(int).tolist()
        ranges = list(itertools.pairwise(bounds))
        if workers == 1:
            for first, last in ranges:
                writer.add(_tokenize(source, tokenizer, first, last, writer.part(first), writer.dtype))
        else:
            # Not forked from here, where there are threads; from a server that has imported the package once for all.
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])
            with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(open_source,)) as pool:
                jobs = [
                    pool.submit(_tokenize_opened, first, last, writer.part(first), writer.dtype)
                    for first, last in ranges
                ]
                try:
                    for job in jobs:
                        writer.add(job.result())
                finally:
                    pool.shutdown(cancel_futures=True)
        return writer.finish(source.fingerprint())


def prepare_stream(
    texts: Iterable[bytes], fingerprint: str, tokenizer: Tokenizer, out: Path, *, replace: bool = False
) -> Prepared:
    """As `prepare`, of texts that come one after the other; `fingerprint` says which they are. One process."""
    with _Writer(out, tokenizer, replace=replace) as writer:
        part = writer.part(0)
        writer.add((part, _write(map(tokenizer.encode, texts), part, writer.dtype)))
        return writer.finish(fingerprint)


class _Writer:
    """Parts in a folder beside the result, joined and moved there at the end, or removed."""

    def __init__(self, out: Path, tokenizer: Tokenizer, *, replace: bool) -> None:
        self.out, self.tokenizer = out.expanduser(), tokenizer
        # As Megatron chooses it.
        self.dtype: type = np.uint16 if tokenizer.vocab_size < 65500 else np.int32
        there = [path for path in self._places(self.out).values() if path.exists()]
        if there and not replace:
            raise ValueError(f"{there[0]} exists already. Choose another --out, or add --replace to write over it.")
        self.folder = with_ending(self.out, "partial")

    def __enter__(self) -> _Writer:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._content = (self.folder / "all.bin").open("wb")
        self._counts: list[np.ndarray] = []
        return self

    def __exit__(self, *exception: object) -> None:
        self._content.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def part(self, first: int) -> Path:
        """Where a part goes."""
        return self.folder / f"{first:012d}.bin"

    def add(self, made: tuple[Path, np.ndarray]) -> None:
        """The next part, in order: its file and the tokens of each of its documents."""
        path, counts = made
        with path.open("rb") as file:
            shutil.copyfileobj(file, self._content, 1 << 24)
        path.unlink()
        self._counts.append(counts)

    def finish(self, source: str) -> Prepared:
        counts = np.concatenate([np.empty(0, dtype=np.int64), *self._counts])
        if not counts.sum():
            raise ValueError("the source has no token; nothing was written.")
        self._content.flush()
        os.fsync(self._content.fileno())
        made = self._places(self.folder / "all")
        write_index(made["idx"], counts, self.dtype)
        sidecar = {
            "format": SIDECAR_FORMAT,
            "tokenizer": self.tokenizer.describe(),
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "source": source,
            "documents": len(counts),
            "tokens": int(counts.sum()),
        }
        made["json"].write_text(json.dumps(sidecar, indent=1) + "\n")
        places = self._places(self.out)
        # Without its index an old .bin is nothing: at no time do the three belong to different sources.
        for ending in ("json", "idx"):
            places[ending].unlink(missing_ok=True)
        for ending in _ENDINGS:
            os.replace(made[ending], places[ending])
        return Prepared(
            prefix=self.out,
            documents=len(counts),
            tokens=int(counts.sum()),
            dtype=np.dtype(self.dtype).name,
            num_bytes=places["bin"].stat().st_size,
        )

    @staticmethod
    def _places(prefix: Path) -> dict[str, Path]:
        return {ending: with_ending(prefix, ending) for ending in _ENDINGS}


def _tokenize(
    source: Texts, tokenizer: Tokenizer, first: int, last: int, part: Path, dtype: type
) -> tuple[Path, np.ndarray]:
    return part, _write((tokenizer.encode(source.read(i)) for i in range(first, last)), part, dtype)


def _write(documents: Iterator[np.ndarray] | map[np.ndarray], part: Path, dtype: type) -> np.ndarray:
    """Write tokens and return the tokens of each document, int64."""
    counts = []
    with part.open("wb") as file:
        for tokens in documents:
            file.write(tokens.astype(dtype).tobytes())
            counts.append(len(tokens))
    return np.array(counts, dtype=np.int64)


_opened: dict[str, Any] = {}


def _open(open_source: Open) -> None:
    """In a worker, once."""
    _opened["source"], _opened["tokenizer"] = open_source()


def _tokenize_opened(first: int, last: int, part: Path, dtype: type) -> tuple[Path, np.ndarray]:
    return _tokenize(_opened["source"], _opened["tokenizer"], first, last, part, dtype)
