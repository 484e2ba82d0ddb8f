"""The paper's cases as FlexAttention takes them: a function of one score, and the block mask made from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.cases import Draw, draw

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, row, column) -> bool, True = visible; broadcasts."""

BLOCK = 128
"""FlexAttention's own block; the blocks of its kernels divide it."""

cached_draw = lru_cache(maxsize=4)(draw)


def case_mask_mod(name: str, n: int, seed: int, device: str) -> MaskMod | None:
    """The function of a case, each with as few loads as it can do with; None where nothing is hidden.

    Tensors that it closes over become inputs of the compiled kernel, so that one compilation serves every draw.
    """
    drawn = cached_draw(n, seed)
    if name == "full":
        return None
    if name == "causal":
        return lambda b, h, q, kv: q >= kv
    if name == "sliding_window":
        return _sliding_window(drawn.window)
    if name == "causal_document":
        return causal_document_mod(drawn.lengths, device)
    if name == "document":
        return _document(drawn, device)
    if name == "shared_question":
        return _causal_until(_shared_until(drawn), device)
    if name == "global_sliding_window":
        return _global_window(drawn.window, drawn.sinks)
    if name == "causal_blockwise":
        return _blockwise(drawn, device)
    if name == "prefix_lm_document":
        return _prefix_lm_document(drawn, device)
    if name == "prefix_lm_causal":
        return _prefix_lm_causal(n // 2)
    if name == "qk_sparse":
        return _causal_from(_hidden_until(drawn, n), device)
    if name == "random_eviction":
        return _causal_until(drawn.evicted.to_startend_row_indices()[0, 0, :, 0], device)
    raise ValueError(f"no FlexAttention form of the case {name!r}; it has the paper's twelve.")


def causal_document_mod(lengths: list[int], device: str) -> MaskMod:
    document = _ids(lengths, device)
    return lambda b, h, q, kv: (q >= kv) & (document[q] == document[kv])


def _sliding_window(window: int) -> MaskMod:
    return lambda b, h, q, kv: (q >= kv) & (q - kv < window)


def _document(drawn: Draw, device: str) -> MaskMod:
    document = _ids(drawn.lengths, device)
    return lambda b, h, q, kv: document[q] == document[kv]


def _global_window(window: int, sinks: int) -> MaskMod:
    return lambda b, h, q, kv: ((q - kv <= window) & (kv - q <= window)) | (kv < sinks) | (q < sinks)


def _blockwise(drawn: Draw, device: str) -> MaskMod:
    document = _ids(drawn.lengths, device)
    last = sum(drawn.lengths[:-1])
    return lambda b, h, q, kv: (q >= kv) & ((q >= last) | (document[q] == document[kv]))


def _prefix_lm_document(drawn: Draw, device: str) -> MaskMod:
    document = _ids(drawn.lengths, device)
    in_prefix = torch.cat(
        [torch.arange(length) < prefix for length, prefix in zip(drawn.lengths, drawn.prefixes, strict=True)]
    ).to(device)
    return lambda b, h, q, kv: (document[q] == document[kv]) & ((q >= kv) | in_prefix[kv])


def _prefix_lm_causal(prefix: int) -> MaskMod:
    return lambda b, h, q, kv: (q >= kv) | (kv < prefix)


def _causal_until(until: Tensor, device: str) -> MaskMod:
    until = until.to(device, torch.int32)
    return lambda b, h, q, kv: (q >= kv) & (q < until[kv])


def _causal_from(start: Tensor, device: str) -> MaskMod:
    start = start.to(device, torch.int32)
    return lambda b, h, q, kv: (q >= kv) & (q >= start[kv])


def _shared_until(drawn: Draw) -> Tensor:
    """Per column the first row after those that see it: the document's end for a question, its own for an answer."""
    until, position = [], 0
    for parts in drawn.questions:
        document_end = position + sum(parts)
        for i, length in enumerate(parts):
            position += length
            until.append(torch.full((length,), document_end if i == 0 else position))
    return torch.cat(until)


def _hidden_until(drawn: Draw, n: int) -> Tensor:
    """Per column the end of the dropped range that holds it, 0 outside: no row of its range sees it."""
    until = torch.zeros(n)
    for start, end in drawn.dropped:
        until[start:end] = end
    return until


def _ids(lengths: list[int], device: str) -> Tensor:
    """int32 `[N]`: which document holds each position."""
    return torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths)).to(device)


def block_mask(mask_mod: MaskMod, n: int, device: str) -> BlockMask:
    """What `create_block_mask` makes of the function for a batch and head that share it, without an N x N tensor.

    It evaluates a strip of rows at a time; nothing is compiled for it, which spares a compilation a case.
    """
    blocks = -(-n // BLOCK)
    visible = torch.empty((blocks, blocks), dtype=torch.int32, device=device)
    columns = torch.arange(n, dtype=torch.int32, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.int32, device=device)
    strip = BLOCK * max(1, 2**28 // (n * BLOCK))
    for first in range(0, n, strip):
        rows = torch.arange(first, min(first + strip, n), dtype=torch.int32, device=device)[:, None]
        seen = mask_mod(zero, zero, rows, columns)
        seen = torch.nn.functional.pad(seen, (0, blocks * BLOCK - n, 0, -len(rows) % BLOCK))
        per_block = seen.unflatten(1, (blocks, BLOCK)).sum(2, dtype=torch.int32).unflatten(0, (-1, BLOCK)).sum(1)
        visible[first // BLOCK : first // BLOCK + len(per_block)] = per_block
    full = visible == BLOCK * BLOCK
    return _from_blocks((visible > 0) & ~full, full, mask_mod, n)


def empty_block_mask(mask_mod: MaskMod, n: int, device: str) -> BlockMask:
    """A block mask of the same shapes with nothing to visit: it compiles what the real one runs, at no cost."""
    nothing = torch.zeros((-(-n // BLOCK),) * 2, dtype=torch.bool, device=device)
    return _from_blocks(nothing, nothing, mask_mod, n)


def block_mask_bytes(n: int) -> int:
    """Bytes of a block mask's tables: partial and full, by rows and by columns, each a list and its count, int32."""
    blocks = -(-n // BLOCK)
    return 4 * 4 * blocks * (blocks + 1)


def _from_blocks(partial: Tensor, full: Tensor, mask_mod: MaskMod, n: int) -> BlockMask:
    def ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
        counts = dense.sum(1, dtype=torch.int32)
        return counts[None, None], torch.argsort(dense.int(), dim=1, descending=True, stable=True).int()[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(n, n)
    )
