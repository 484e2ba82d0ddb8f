"""Text and conversations as tokens."""

from __future__ import annotations

import hashlib
from threading import Lock
from typing import Any, Protocol

from fm_longctx.data import ByteTokenizer


class Encoder(Protocol):
    """What a record's texts are turned into tokens with."""

    @property
    def eos(self) -> int | None:
        """The token that ends an answer; None if there is none."""
        ...

    def text(self, text: str) -> list[int]:
        """Tokens of a text that begins a sequence, with what the tokenizer puts there; no end."""
        ...

    def chat(
        self, messages: Any, *, generation: bool = False, assistant_only: bool = False, **options: Any
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation under the tokenizer's chat template, and which of them are to be learned.

        Args:
            messages: of `role` and `content`.
            generation: end with what comes before the assistant's turn.
            assistant_only: only the assistant's tokens are learned; otherwise all.
            options: further arguments of the template, such as tools.
        """
        ...

    def fingerprint(self) -> str:
        """What decides the tokens, in few characters."""
        ...


class ByteEncoder:
    """One token a byte after BOS; no conversations."""

    eos: int | None = ByteTokenizer.eos

    def text(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"a text must be a string, got {text!r}.")
        return [ByteTokenizer.bos, *text.encode()]

    def chat(
        self, messages: Any, *, generation: bool = False, assistant_only: bool = False, **options: Any
    ) -> tuple[list[int], list[bool]]:
        raise ValueError(
            "it holds messages, and bytes have no chat template. Give a tokenizer that has one, or write prompt and "
            "answers as text."
        )

    def fingerprint(self) -> str:
        return "bytes"


class HuggingFaceEncoder:
    """A Hugging Face tokenizer, called by one thread at a time: its backend's settings are shared."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = Lock()

    @classmethod
    def from_folder(cls, folder: str) -> HuggingFaceEncoder:
        """The tokenizer in a local folder; a ValueError if there is none."""
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception as error:  # whatever the library raises for a broken folder
            raise ValueError(f"transformers cannot load a tokenizer from {folder}: {error}") from error

    @property
    def eos(self) -> int | None:
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    def text(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"a text must be a string, got {text!r}.")
        with self._lock:
            ids = [int(i) for i in self.tokenizer(text).input_ids]
        # Some tokenizers end every text; an answer may go on here.
        return ids[:-1] if ids and ids[-1] == self.eos and not text.endswith(self.tokenizer.eos_token) else ids

    def chat(
        self, messages: Any, *, generation: bool = False, assistant_only: bool = False, **options: Any
    ) -> tuple[list[int], list[bool]]:
        if self.tokenizer.chat_template is None:
            raise ValueError("it holds messages, and the tokenizer has no chat template. Write the texts out instead.")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError(f"messages must be a list of objects with role and content, got {messages!r}.")
        with self._lock:
            encoded = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=assistant_only,
                **options,
            )
        ids = [int(i) for i in encoded["input_ids"]]
        if not assistant_only:
            return ids, [True] * len(ids)
        marks = [bool(mark) for mark in encoded["assistant_masks"]]
        if not any(marks):
            raise ValueError(
                "the chat template marks no token as the assistant's. task.assistant_only needs {% generation %} in it."
            )
        return ids, marks

    def fingerprint(self) -> str:
        words = repr((sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template))
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
