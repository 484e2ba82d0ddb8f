"""Documents as tokens: what packing stands on. Token counts of all, tokens of any."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol, runtime_checkable

import numpy as np

from fm_longctx.data.tokenizer import ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

SLOW_TO_COUNT = 64 << 20
"""Bytes of text above which counting its tokens is announced."""
TOO_LARGE_TO_COUNT = 16 << 30
"""Bytes of text above which tokens are not counted at a run's start."""

_KEPT = 8


class Texts(Protocol):
    """Documents as text, any of them at any time."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """UTF-8."""
        ...

    def fingerprint(self) -> str:
        """Of which texts these are."""
        ...

    @property
    def num_bytes(self) -> int:
        """About how much text there is."""
        ...


@runtime_checkable
class Sized(Protocol):
    """Texts whose lengths are known unread."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each."""
        ...


class Documents(Protocol):
    """Documents as tokens."""

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each document, int64 `[documents]`."""
        ...

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document, integers. Several threads may ask at once."""
        ...

    def fingerprint(self) -> str:
        """Of which tokens these are."""
        ...


class TokenizedTexts:
    """Texts under a tokenizer. Counts come from the texts' sizes where a token is a byte; else every text is tokenized
    once and the counts are kept in a file, so that only the first run (and on each machine only one rank) counts.

    Args:
        source: the texts.
        tokenizer: makes tokens of them.
        cache: folder for files of counts, made if there is none. None: count anew.

    Raises:
        ValueError: more than `TOO_LARGE_TO_COUNT` bytes would have to be tokenized first.
    """

    def __init__(self, source: Texts, tokenizer: Tokenizer, *, cache: Path | None = None) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()
        if isinstance(tokenizer, ByteTokenizer) and isinstance(source, Sized):
            self.counts = np.array([tokenizer.count(size) for size in source.sizes], dtype=np.int64)
        else:
            self.counts = self._counts(cache)

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of a document; the last few documents are kept, as long ones are read piece by piece.

        Raises:
            ValueError: the text has not as many tokens as it had when they were counted.
        """
        with self._lock:
            tokens = self._recent.get(index)
        if tokens is None:
            tokens = self.tokenizer.encode(self.source.read(index))
            if len(tokens) != self.counts[index]:
                raise ValueError(
                    f"document {index} has {len(tokens)} tokens and had {self.counts[index]} when they were counted: "
                    "the text changed. Start the run again; if that does not help, delete the files of data.cache."
                )
            with self._lock:
                self._recent[index] = tokens
                while len(self._recent) > _KEPT:
                    self._recent.popitem(last=False)
        return tokens[start:stop]

    def fingerprint(self) -> str:
        """32 hexadecimal digits of texts and tokenizer."""
        parts = (self.source.fingerprint(), self.tokenizer.fingerprint())
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _counts(self, cache: Path | None) -> np.ndarray:
        if cache is None:
            return self._count()
        path = cache / f"counts-{self.fingerprint()}.npy"
        with _alone(path.with_suffix(".lock")):
            if path.is_file():
                counts: np.ndarray = np.load(path)
                if counts.shape == (len(self.source),):
                    return counts
            counts = self._count()
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, counts)
            os.replace(partial, path)
        return counts

    def _count(self) -> np.ndarray:
        size = self.source.num_bytes
        if size > TOO_LARGE_TO_COUNT:
            raise ValueError(
                f"packing needs the token count of each document, and {size / 2**30:,.0f} GiB of text are too much to "
                "tokenize at a run's start. Prepare them once with launch/prepare_data.py and set data.source: tokens."
            )
        if size > SLOW_TO_COUNT:
            log.warning(
                "counting the tokens of %s MiB of text, once; launch/prepare_data.py also saves tokenizing them again",
                f"{size / 2**20:,.0f}",
            )
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            counts = pool.map(lambda i: len(self.tokenizer.encode(self.source.read(i))), range(len(self.source)))
            return np.fromiter(counts, dtype=np.int64, count=len(self.source))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process of the machine at a time is inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
