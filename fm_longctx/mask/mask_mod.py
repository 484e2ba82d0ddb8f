"""From a FlexAttention-style function to intervals, evaluated in blocks: no rows x columns tensor is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fm_longctx.mask.runs import MaskedRuns

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`mask_mod(b, h, q_idx, kv_idx)`: four int64 scalar tensors to a bool scalar tensor, True = visible."""


def evaluate_mask_mod(
    mask_mod: MaskMod,
    *,
    num_rows: int,
    num_columns: int,
    batch: int,
    heads: int,
    device: torch.device,
    max_intervals: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """starts, ends int32 `[B, H_mask, K, N_k]` of the function's masked rows, with the smallest K.

    The function is written for one score: batch, head, row and column as scalar tensors. `torch.vmap` evaluates it on
    `block` x `block` scores at once, so memory is O(block^2 + K x N_k), times what the function itself keeps; time is
    O(B x H_mask x N_q x N_k) evaluations. What vmap refuses (a Python `if` or `and` on an index, random numbers) raises
    its RuntimeError. Tensors that the function captures may be indexed by its arguments and must be on `device`.

    Args:
        mask_mod: the function; it is called once a block.
        num_rows, num_columns: N_q and N_k; `q_idx` runs over `[0, N_q)` and `kv_idx` over `[0, N_k)`.
        batch, heads: B and H_mask, the ranges of `b` and `h`: 1 where the function does not look at them.
        device: where it is evaluated, and where the result lies.
        max_intervals: the largest K allowed, >= 0.
        block: rows and columns evaluated at once, >= 1.

    Raises:
        ValueError: an argument out of range; a result that is not a bool scalar; or, after all scores have been seen, a
            column with more masked runs than `max_intervals`, which is named.

    Source: `torch.nn.attention.flex_attention.create_mask`, which maps the same function over all scores at once.
    """
    if not callable(mask_mod):
        raise ValueError(f"mask_mod must be a function (b, h, q_idx, kv_idx) -> bool, got {type(mask_mod).__name__}.")
    sizes = {"num_rows": (num_rows, 0), "num_columns": (num_columns, 0), "batch": (batch, 1), "heads": (heads, 1)}
    for name, (value, least) in {**sizes, "block": (block, 1)}.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ValueError(f"{name} must be an integer in [{least}, 2**31), got {value!r}.")

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        result = mask_mod(b, h, row, column)
        if not isinstance(result, Tensor) or result.dtype != torch.bool or result.ndim != 0:
            got = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"mask_mod must return a bool scalar tensor (True = visible) for scalar indices, got {got}. "
                "Compare the indices, as in `q_idx >= kv_idx`, and join conditions with & and |."
            )
        return result

    over_columns = torch.vmap(visible, in_dims=(None, None, None, 0))
    over_block = torch.vmap(over_columns, in_dims=(None, None, 0, None))
    runs = MaskedRuns(batch, heads, num_rows, num_columns, max_intervals=max_intervals, device=device)
    # To index by a scalar tensor PyTorch may read its value, which a mapped one does not have and a GPU must wait for.
    with _TensorsAsIndices():
        for b in range(batch):
            for h in range(heads):
                sample, head = torch.tensor(b, device=device), torch.tensor(h, device=device)
                for column in range(0, num_columns, block):
                    columns = torch.arange(column, min(column + block, num_columns), device=device)
                    for row in range(0, num_rows, block):
                        rows = torch.arange(row, min(row + block, num_rows), device=device)
                        masked = ~over_block(sample, head, rows, columns)
                        runs.add(masked, b=b, h=h, first_row=row, first_column=column)
    return runs.intervals()


class _TensorsAsIndices(TorchFunctionMode):
    """`x[i]` and `x[i, j]` with tensors (and integers beside them) gather, also where the tensors are scalars."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            x, index = args
            parts = index if isinstance(index, tuple) else (index,)
            if all(isinstance(i, Tensor) or (isinstance(i, int) and not isinstance(i, bool)) for i in parts):
                indices = [i if isinstance(i, Tensor) else torch.tensor(i, device=x.device) for i in parts]
                return torch.ops.aten.index.Tensor(x, indices)
        return func(*args, **(kwargs or {}))
