"""From text to tokens: bytes, or a Hugging Face tokenizer in a local folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """Makes a document's tokens of its text. Several threads may call it at once."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """int64 `[tokens]` of one whole document, given as UTF-8, with what marks its begin and end."""
        ...

    def decode(self, tokens: np.ndarray) -> str: ...

    def describe(self) -> dict[str, Any]:
        """What it is, for people and for the file beside prepared tokens."""
        ...

    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same tokens."""
        ...


class ByteTokenizer:
    """One token a byte (ids 0..255); a document begins with BOS (256) and ends with EOS (257).

    BOS lets the first byte be predicted, EOS lets the end be. A model that knows nothing has a loss of
    ln(258) = 5.553 nats a token. Token counts follow from byte counts, so nothing is read to plan the packing.
    """

    bos = 256
    eos = 257
    vocab_size = 258

    def count(self, num_bytes: int) -> int:
        """Tokens of a document of so many bytes."""
        return num_bytes + 2

    def encode(self, text: bytes) -> np.ndarray:
        """int64 `[len(text) + 2]`."""
        tokens = np.empty(len(text) + 2, dtype=np.int64)
        tokens[0], tokens[-1] = self.bos, self.eos
        tokens[1:-1] = np.frombuffer(text, dtype=np.uint8)
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        """The text of the byte tokens among these; BOS and EOS are left out."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": "bytes", "vocab_size": self.vocab_size, "bos": self.bos, "eos": self.eos}

    def fingerprint(self) -> str:
        return "bytes"


class HuggingFaceTokenizer:
    """A tokenizer in a local folder, as transformers loads it, without its own template of special tokens.

    A document is its BOS, the text's tokens, its EOS; each of the two where the tokenizer has one, or as `add_bos` and
    `add_eos` say. Truncation and padding that the folder asks for are turned off. A special token written out in the
    text becomes that token, as in the library; bytes that are no UTF-8 become U+FFFD.

    Args:
        folder: with tokenizer.json or whatever else `AutoTokenizer` loads.
        add_bos, add_eos: None: if the tokenizer has one.

    Raises:
        ValueError: transformers is missing, no tokenizer there, or a BOS or EOS asked for that it does not have.
    """

    def __init__(self, folder: str | Path, *, add_bos: bool | None = None, add_eos: bool | None = None) -> None:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"data.tokenizer={str(folder)!r} is no folder. Give bytes, or a local folder with tokenizer.json."
            )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(
                "a Hugging Face tokenizer needs transformers: pip install 'fm_longctx[train]'; or set data.tokenizer: "
                "bytes."
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # whatever the library raises for a broken folder
            raise ValueError(f"transformers cannot load a tokenizer from {folder}: {error}") from error
        self.name = folder.name
        file = folder / "tokenizer.json"
        vocabulary = self._tokenizer.get_vocab()
        words = json.dumps(sorted(vocabulary.items())).encode()
        self._content = hashlib.blake2b(file.read_bytes() if file.is_file() else words).digest()
        # transformers' own call sets truncation on the shared backend each time, which threads must not do at once.
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._lock = Lock()
        self._before = _marker("bos", self._tokenizer.bos_token_id, add_bos, folder)
        self._after = _marker("eos", self._tokenizer.eos_token_id, add_eos, folder)
        largest = max(vocabulary.values(), default=0)
        self.vocab_size = max(len(self._tokenizer), largest + 1)

    def encode(self, text: bytes) -> np.ndarray:
        """int64 `[tokens]`."""
        words = text.decode("utf-8", errors="replace")
        if self._backend is not None:
            ids = self._backend.encode(words, add_special_tokens=False).ids
        else:
            with self._lock:
                ids = self._tokenizer.encode(words, add_special_tokens=False)
        return np.array([*self._before, *ids, *self._after], dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without special tokens."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True))

    def describe(self) -> dict[str, Any]:
        return {
            "tokenizer": self.name,
            "vocab_size": self.vocab_size,
            "bos": self._before[0] if self._before else None,
            "eos": self._after[0] if self._after else None,
        }

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the tokenizer's file (its vocabulary, without one) and of what is put around text.

        Not of what the library makes of the file: another version of it may write that down in other words.
        """
        digest = hashlib.blake2b(self._content, digest_size=16)
        digest.update(repr((self._before, self._after)).encode())
        return digest.hexdigest()


def _marker(name: str, token: int | None, wanted: bool | None, folder: Path) -> list[int]:
    if token is None and wanted:
        raise ValueError(f"data.add_{name} is true but the tokenizer in {folder} has no {name.upper()} token.")
    return [] if token is None or wanted is False else [int(token)]
