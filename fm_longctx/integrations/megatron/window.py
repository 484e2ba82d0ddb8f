"""`TransformerConfig.window_size` as a mask."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.utils import is_layer_window_attention

from fm_longctx.mask import FlashMask

Window = tuple[int, int]


def layer_window(config: Any, layer_number: int) -> Window | None:
    """The window that the config gives a layer (`layer_number` counts from 1), None for full attention."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    window = tuple(config.window_size)
    return None if window == (-1, -1) else window


def window_mask(length: int, window: Window) -> FlashMask:
    """Row i sees columns `[i - left, i + right]`, Megatron's and TransformerEngine's rule; -1 is no bound."""
    left, right = window
    if left < -1 or right < -1:
        raise ValueError(f"window_size must be (left, right), each -1 (no bound) or >= 0, got {window}.")
    column = torch.arange(length)
    below = column + left + 1 if left >= 0 else torch.full_like(column, length)
    above = column - right if right >= 0 else torch.zeros_like(column)
    starts = torch.stack([torch.zeros_like(column), below])
    ends = torch.stack([above, torch.full_like(column, length)])
    return FlashMask(starts[None, None].int(), ends[None, None].int(), causal=False)
