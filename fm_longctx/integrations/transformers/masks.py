"""The mask of one call of a model: what transformers asks for, answered as a FlashMask.

transformers calls `request_mask` once per call for each kind of layer (full, sliding) and hands the result to the
layers of that kind as their attention_mask. Only there are positions and explicit masks known, so the request is a note
of what was asked, and the first layer answers it for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fm_longctx.mask import FlashMask

_LIBRARY = "transformers.masking_utils"


@dataclass(kw_only=True, eq=False)
class MaskRequest:
    """What transformers wants for the layers of one kind in one call. Indices count from the cache's first token."""

    q_length: int
    """Queries of this call, N_q."""
    kv_length: int
    """Keys that they meet, N_k: from a cache and of this call."""
    q_offset: int | Tensor
    """Index of the first query."""
    kv_offset: int
    """Index of the first key; above 0 where a sliding cache has dropped the oldest."""
    mask_function: Callable[..., Any] | None
    """Its rule, a composition of the functions of transformers.masking_utils."""
    padding: Tensor | None
    """Bool `[B, n]` over indices, False = hidden; those from n on are hidden too."""
    device: torch.device
    answers: dict[Any, FlashMask] = field(default_factory=dict)

    # generate() with a static cache asks for the masks itself and passes them to the model as a 4-D mask, contiguous.
    ndim = 4

    def contiguous(self) -> MaskRequest:
        return self

    def window(self) -> int | None:
        """The sliding window that was asked for.

        Raises:
            ValueError: the rule has a part that is neither causal, nor a window, nor packed documents.
        """
        window, causal = _rule(self.mask_function)
        if not causal:
            raise ValueError(
                "the model asks for attention that is not causal, which only an explicit mask can say: pass "
                "flashmask=, for example fm_longctx.mask.full(length)."
            )
        return window

    def answer(self, window: int | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> FlashMask:
        """Causal, within the window, within documents, without padding; built at the first call.

        Args:
            window: keys that a row sees, itself included.
            position_ids: `[B or 1, N_q]`. Without a cache a document starts wherever they do not rise by 1.
            cu_seq_lens: `[documents + 1]`, further boundaries of documents; batch 1.

        Raises:
            ValueError: positions or boundaries that cannot be honoured.
        """
        if window not in self.answers:
            mask = self.bounds(window, causal=True)
            documents = self._documents(position_ids, cu_seq_lens)
            for part in documents:
                mask = mask & part
            self.answers[window] = mask
        return self.answers[window]

    def hide_padding(self, mask: FlashMask) -> FlashMask:
        """An explicit mask without the padding's columns; itself if there is no padding."""
        if self.padding is None:
            return mask
        if mask not in self.answers:
            self.answers[mask] = mask & self.bounds(None, causal=False)
        return self.answers[mask]

    def bounds(self, window: int | None, *, causal: bool) -> FlashMask:
        """Everything but documents: the diagonal, the window and the padding, in indices that count from the cache."""
        n_q, n_k, q_offset = self.q_length, self.kv_length, int(self.q_offset)
        # Row of this call that has the column's index.
        row = torch.arange(n_k, device=self.device)[None] + (self.kv_offset - q_offset)
        aligned = self.kv_offset + n_k == q_offset + n_q
        none, all_rows = torch.zeros_like(row), torch.full_like(row, n_q)
        intervals = []
        if causal and not aligned:
            intervals.append((none, row))
        if window is not None:
            intervals.append((row + window, all_rows))
        if self.padding is not None:
            shown = self.padding[:, self.kv_offset : self.kv_offset + n_k]
            shown = torch.nn.functional.pad(shown, (0, n_k - shown.shape[1]))
            intervals.append((none, torch.where(shown, 0, n_q)))
        return _mask(intervals, n_k, causal=causal and aligned, num_rows=n_q, device=self.device)

    def _documents(self, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> list[FlashMask]:
        q_offset = int(self.q_offset)
        fresh = q_offset == 0 and self.kv_offset == 0 and self.q_length == self.kv_length
        if fresh:
            return documents(position_ids, cu_seq_lens)
        if cu_seq_lens is not None:
            raise ValueError(
                "cu_seq_lens_q cannot be combined with keys from a cache. Pass use_cache=False, or the documents one "
                "by one."
            )
        if position_ids is not None and position_ids.ndim == 2:
            # A position below the number of tokens before it restarted: it belongs to a document of its own.
            before: Tensor = torch.arange(q_offset, q_offset + self.q_length, device=self.device)
            if self.padding is not None:
                before = self.padding.cumsum(1)[:, q_offset : q_offset + self.q_length] - 1
            if bool((position_ids < before).any()):
                raise ValueError(
                    f"position_ids restart although {self.q_length} queries meet {self.kv_length} keys from a cache: "
                    "where the documents in the cache begin is not known. Generate from one document per row (padded "
                    "with attention_mask), or pass use_cache=False."
                )
        return []


def request_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | MaskRequest | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> MaskRequest:
    """What transformers calls instead of building a mask.

    Args:
        attention_mask: 2-D padding, bool `[B, n]`, False = hidden; or the request itself, from generate(). 4-D masks
            never come here.
        kwargs: hints for other implementations.
    """
    if isinstance(attention_mask, MaskRequest):
        return attention_mask
    return MaskRequest(
        q_length=q_length,
        kv_length=kv_length,
        # A static cache counts its tokens in this tensor: keep what it says now.
        q_offset=q_offset.clone() if isinstance(q_offset, Tensor) else q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        padding=None if attention_mask is None else attention_mask.bool(),
        device=torch.device(device),
    )


def documents(position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> list[FlashMask]:
    """Masks whose intersection is the documents; none where nothing tells them apart."""
    parts = []
    if position_ids is not None:
        if position_ids.ndim != 2:
            raise ValueError(
                f"documents cannot be told from position_ids of shape {list(position_ids.shape)}: they must be [B, N]. "
                "Pass flashmask=."
            )
        parts.append(FlashMask.from_position_ids(position_ids))
    if cu_seq_lens is not None:
        parts.append(FlashMask.from_cu_seqlens(cu_seq_lens))
    return parts


def within_window(mask: FlashMask, window: int, position_ids: Tensor | None) -> FlashMask:
    """An explicit mask, and nothing that lies `window` or more positions back; kept on the mask.

    Distance is counted in positions, as the model would count it for each sequence alone. Intervals can say that where
    positions rise by 1 along everything that a row sees.

    Raises:
        ValueError: they do not: branches of a tree, or answers after a shared question.
    """
    key = ("fm_longctx", "within window", window)
    if key not in mask.cache:
        n_q, n_k = mask.num_rows, mask.num_columns
        if position_ids is not None and n_q == n_k and window < n_k:
            runs = FlashMask.from_position_ids(position_ids.to(mask.device), causal=False)
            if bool(((mask & runs).area() != mask.area()).any()):
                raise ValueError(
                    f"a layer has sliding_window={window}, and flashmask= joins tokens whose position_ids do not "
                    "follow one another (a tree, a shared question, or packed documents of another split): there a "
                    "window of positions is not a window of rows. Pass a mask for each kind of layer, "
                    'flashmask={"full_attention": ..., "sliding_attention": ...}, as DataCollatorForFlashMask('
                    "sliding_window=...) makes them, or set sliding_window=None in the model's config."
                )
        row = torch.arange(n_k, device=mask.device)[None] - (n_k - n_q)
        interval = (row + window, torch.full_like(row, n_q))
        mask.cache[key] = mask & _mask([interval], n_k, causal=False, num_rows=n_q, device=mask.device)
    narrow: FlashMask = mask.cache[key]
    return narrow


def _mask(
    intervals: list[tuple[Tensor, Tensor]], n_k: int, *, causal: bool, num_rows: int, device: torch.device
) -> FlashMask:
    """From int64 `[B or 1, N_k]` starts and ends of each interval."""
    batch = max([1, *(end.shape[0] for _, end in intervals)])
    shape = (batch, 1, len(intervals), n_k)
    starts = torch.zeros(shape, dtype=torch.int32, device=device)
    ends = torch.zeros(shape, dtype=torch.int32, device=device)
    for i, (start, end) in enumerate(intervals):
        starts[:, 0, i], ends[:, 0, i] = start, end
    return FlashMask(starts, ends, causal=causal, num_rows=num_rows)


def _rule(mask_function: Callable[..., Any] | None) -> tuple[int | None, bool]:
    """Window and causality of a rule of transformers, read from the functions that it is composed of.

    Packed documents in it are the ones that the layers see in position_ids.
    """
    if mask_function is None:
        return None, True
    window, causal = None, False
    left = [mask_function]
    while left:
        function = left.pop()
        name = getattr(function, "__qualname__", repr(function))
        if getattr(function, "__module__", None) != _LIBRARY:
            raise _unknown(name)
        code, cells = function.__code__, function.__closure__ or ()
        inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
        if name == "causal_mask_function":
            causal = True
        elif name == "and_masks.<locals>.and_mask":
            left.extend(inside["mask_functions"])
        elif name == "sliding_window_overlay.<locals>.inner_mask":
            window = min(inside["sliding_window"], window or inside["sliding_window"])
        elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
            left.append(inside["mask_function"])
        elif name == "bidirectional_mask_function":
            pass
        elif name != "packed_sequence_mask_function.<locals>.inner_mask":
            raise _unknown(name)
    return window, causal


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"the model asks for a mask that is not a causal, sliding-window or packed one: its rule contains {name}. Pass "
        'the mask that you mean as flashmask=, or take another implementation, such as "sdpa".'
    )
