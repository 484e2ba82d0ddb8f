"""Multi-token prediction under any layout: the next position's value, within its document."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

from fm_longctx.integrations.megatron.params import FlashMaskParams

_megatron_roll = multi_token_prediction.roll_tensor


def install() -> None:
    """Let Megatron's `roll_tensor` be `roll_tensor` of this module, in the two modules that call it."""
    multi_token_prediction.roll_tensor = roll_tensor
    gpt_model.roll_tensor = roll_tensor


def roll_tensor(
    tensor: Tensor, shifts: int = -1, dims: int = -1, cp_group: Any = None, packed_seq_params: Any = None
) -> tuple[Tensor, Tensor]:
    """Megatron's own for all parameters but ours; for these `[B, T]` with each position's successor, and its sum.

    A document's last position gets 0, as in Megatron for thd batches: for a loss mask that is no label.
    """
    if not isinstance(packed_seq_params, FlashMaskParams):
        rolled: tuple[Tensor, Tensor] = _megatron_roll(tensor, shifts, dims, cp_group, packed_seq_params)
        return rolled
    assert shifts == -1 and dims in (-1, tensor.ndim - 1), "Megatron shifts by one along the last dimension"
    context = packed_seq_params.context
    where, last = _successors(packed_seq_params)
    everything = tensor
    if context.group is not None:
        assert packed_seq_params.plan is not None
        longest = max(len(packed_seq_params.plan.rows(rank)) for rank in range(context.world_size))
        padded = torch.nn.functional.pad(tensor, (0, longest - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(context.world_size)]
        dist.all_gather(parts, padded, group=context.group)
        everything = torch.cat(parts, dim=-1)
    result = everything.index_select(-1, where.to(tensor.device))
    result = result.masked_fill(last.to(tensor.device), 0)
    return result, result.sum()


def _successors(params: FlashMaskParams) -> tuple[Tensor, Tensor]:
    """Where each of the rank's positions finds the next one among all ranks' (each padded to the longest), `[T]`, and
    which of its positions are a document's last."""
    if params.plan is None or params.documents is None:
        raise ValueError(
            "multi-token prediction needs to know which token follows which, and a mask alone does not say: in a tree "
            "several may. Build the parameters with FlashMaskParams.from_cu_seqlens, or pass cu_seqlens to build."
        )
    plan, n = params.plan, params.context.num_tokens
    everyone = [plan.rows(rank) for rank in range(plan.world_size)]
    longest = max(len(rows) for rows in everyone)
    place = torch.empty(n, dtype=torch.int64)
    for rank, rows in enumerate(everyone):
        place[rows] = rank * longest + torch.arange(len(rows))
    is_last = torch.zeros(n, dtype=torch.bool)
    ends = params.documents.long()[1:]
    is_last[ends[ends > 0] - 1] = True
    rows = params.context.rows
    return place[(rows + 1).clamp(max=n - 1)], is_last[rows]
