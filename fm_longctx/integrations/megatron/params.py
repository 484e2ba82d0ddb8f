"""The mask's way through Megatron: a `PackedSeqParams` that every layer, recomputation and pipeline stage is handed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from fm_longctx import ContextParallel, FlashMask, ShardPlan
from fm_longctx.integrations.megatron.window import Window, window_mask
from fm_longctx.integrations.megatron.zigzag import zigzag_owners

Sharding = Literal["plan", "zigzag"]


class FlashMaskParams(PackedSeqParams):
    """One micro-batch's mask, layout and positions; pass it as `packed_seq_params` on every pipeline stage.

    Build it with `from_cu_seqlens` or `build`, once per micro-batch and on every rank: each needs the mask, also those
    of the middle pipeline stages that get no tokens. All ranks of a context-parallel group must build it from the same
    mask, which is checked.

        params = FlashMaskParams.build(mask, position_ids=batch["position_ids"])
        batch = params.shard_batch(batch)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=params)

    With `sharding="plan"` the ranks' positions follow a `ShardPlan`, balanced by the mask, and RoPE must follow them:
    `use_position_ids(model)`. With `"zigzag"` they are Megatron's own, so `get_batch_on_this_cp_rank` and RoPE stay as
    they are, and N must divide by 2 x ranks.

    Args:
        context: group, layout and mask of the layers with full attention; its `rows` are this rank's positions.
        window_context: the same layout with the mask of the layers with sliding-window attention.
        window: the `window_size` that `window_context` is for.
        sharding: whose layout it is.
        position_ids: int64 `[1 or B, T]` on the device, this rank's; None leaves positions to Megatron.
        plan: the whole layout, and
        cu_seqlens: the documents' bounds, `[documents + 1]`: only multi-token prediction needs these two.
    """

    # Identity: the base class, a dataclass, compares tensors field by field.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        context: ContextParallel,
        *,
        window_context: ContextParallel | None = None,
        window: Window | None = None,
        sharding: Sharding = "plan",
        position_ids: Tensor | None = None,
        plan: ShardPlan | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        self.qkv_format = "sbhd"  # Megatron treats nothing but "thd" specially
        self.context = context
        self.window_context, self.window = window_context, window
        self.sharding = sharding
        self.position_ids = position_ids
        self.plan, self.documents = plan, cu_seqlens

    @classmethod
    def build(
        cls,
        mask: FlashMask,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        window_size: Window | None = None,
        sharding: Sharding = "plan",
        plan: ShardPlan | None = None,
        num_stages: int | None = None,
        device: torch.device | str | None = None,
        pg_collection: Any = None,
        check: bool = True,
    ) -> FlashMaskParams:
        """From any mask of N rows and columns.

        Args:
            mask: the global mask. Heads: 1, or the model's query or key/value heads, of which each tensor-parallel rank
                takes its own. Batch: 1 or the micro-batch size.
            position_ids: integers `[N]` or `[B, N]`, global, for RoPE. Not given: they restart with each document if
                cu_seqlens is given, and count from 0 to N if not. Only with `sharding="plan"`.
            cu_seqlens: the bounds of the documents in the mask, integers from 0 to N.
            window_size: the config's, where some or all layers have one: these get `mask` within the window.
            sharding: "plan" or "zigzag", as above.
            plan: the plan to use, made before (in a loader's worker); built here if not given.
            num_stages: as in `ShardPlan.build`; a given plan has its own.
            device: where attention runs; the current GPU, or the CPU where there is none, if not given.
            pg_collection: the model's process groups (its `cp` and `tp` are used), if it was built with its own.
            check: compare the ranks' masks and plans: one small collective, for which the host waits.

        Raises:
            ValueError: what does not fit together, or zigzag with a length that it cannot cut.
        """
        if sharding not in ("plan", "zigzag"):
            raise ValueError(f'sharding must be "plan" or "zigzag", got {sharding!r}.')
        n = mask.num_rows
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.cpu()
            if int(cu_seqlens[-1]) != n:
                raise ValueError(f"cu_seqlens end at {int(cu_seqlens[-1])} but the mask has {n} positions.")
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        cp, tp = _groups(pg_collection)
        world_size = dist.get_world_size(cp)
        masks = [mask.to("cpu")]
        if window_size is not None:
            masks.append(masks[0] & window_mask(n, window_size))
        if plan is not None and num_stages is not None:
            raise ValueError("pass num_stages to ShardPlan.build: the plan that was given has its own.")
        if sharding == "zigzag":
            owners = zigzag_owners(torch.tensor([0, n]), world_size)
            if plan is None:
                plan = ShardPlan.from_owners(masks, owners, world_size, num_stages=num_stages)
            elif not all(plan.rows(r).equal((owners == r).nonzero()[:, 0]) for r in range(world_size)):
                raise ValueError("the plan's layout is not Megatron's. Leave it out, or use sharding=\"plan\".")
        elif plan is None:
            plan = ShardPlan.build(masks, world_size, num_stages=num_stages)
        group = cp if world_size > 1 else None
        contexts = [ContextParallel(group, plan, _local_heads(m, tp), device=device, check=check) for m in masks]
        return cls(
            contexts[0],
            window_context=contexts[1] if window_size is not None else None,
            window=None if window_size is None else (window_size[0], window_size[1]),
            sharding=sharding,
            position_ids=_local_positions(position_ids, cu_seqlens, n, contexts[0], sharding, device),
            plan=plan,
            cu_seqlens=cu_seqlens,
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, causal: bool = True, **options: Any) -> FlashMaskParams:
        """From the bounds of packed documents, integers `[documents + 1]` from 0 to N; options as in `build`."""
        bounds = cu_seqlens.cpu()
        return cls.build(FlashMask.from_cu_seqlens(bounds, causal=causal), cu_seqlens=bounds, **options)

    def shard_batch(self, batch: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """This rank's part of a global batch: `[B, N, ...]` to `[B, T, ...]`; None stays None.

        It takes the place of Megatron's `get_batch_on_this_cp_rank` and follows the layout, whichever it is.

        Raises:
            ValueError: an `attention_mask` (the mask is in here already), or an entry without N positions.
        """
        n, local = self.context.num_tokens, {}
        for name, value in batch.items():
            if value is not None and name == "attention_mask":
                raise ValueError(
                    "the batch holds an attention_mask beside the FlashMask, and one of them would be dropped. Set "
                    "create_attention_mask=False in the dataset's config (--no-create-attention-mask-in-dataloader)."
                )
            if value is not None and (value.ndim < 2 or value.shape[1] != n):
                raise ValueError(
                    f"batch[{name!r}] must be [B, {n}, ...], got {list(value.shape)}: pass global tensors."
                )
            local[name] = None if value is None else value.index_select(1, self.context.rows.to(value.device))
        return local

    # What Megatron reads of a PackedSeqParams that is not "thd"

    @property
    def max_seqlen_q(self) -> int:
        """N: how long Megatron's RoPE believes the sequence to be, before it cuts it zigzag."""
        if self.sharding == "plan":
            raise ValueError(
                "this model's RoPE would count positions as Megatron's zigzag sharding lays them out, but the batch is "
                'laid out by a plan. Call use_position_ids(model) after building the model, or pass sharding="zigzag".'
            )
        return self.context.num_tokens

    max_seqlen_kv = max_seqlen_q

    @property
    def cu_seqlens_q(self) -> Tensor:
        raise ValueError(
            "Megatron's multi-token prediction would shift tokens as its own sharding lays them out. Pass the MTP "
            "block's spec through use_flashmask too, which makes it shift within documents under any layout."
        )

    cu_seqlens_kv = cu_seqlens_q

    def __repr__(self) -> str:
        return (
            f"FlashMaskParams({self.context.num_tokens} positions, rank {self.context.rank} of "
            f"{self.context.world_size} holds {len(self.context.rows)}, sharding={self.sharding!r})"
        )


def _groups(pg_collection: Any) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The context-parallel and the tensor-parallel group."""
    if pg_collection is not None:
        return pg_collection.cp, pg_collection.tp
    return parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()


def _local_heads(mask: FlashMask, group: dist.ProcessGroup) -> FlashMask:
    """This tensor-parallel rank's heads of a mask that has several."""
    ranks = dist.get_world_size(group)
    if mask.heads == 1 or ranks == 1:
        return mask
    if mask.heads % ranks:
        raise ValueError(
            f"{ranks} tensor-parallel ranks cannot share the mask's {mask.heads} heads. Give it 1 head or a multiple."
        )
    share = mask.heads // ranks
    first = share * dist.get_rank(group)
    return FlashMask(
        mask.starts[:, first : first + share],
        mask.ends[:, first : first + share],
        causal=mask.causal,
        num_rows=mask.num_rows,
    )


def _local_positions(
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    n: int,
    context: ContextParallel,
    sharding: str,
    device: torch.device | str,
) -> Tensor | None:
    """int64 `[1 or B, T]` on the device."""
    if sharding == "zigzag":
        if position_ids is not None:
            raise ValueError(
                'position_ids have no effect with sharding="zigzag": RoPE counts from the start of the sequence, which '
                'within a document is as good. For other positions (the depth in a tree) use sharding="plan".'
            )
        return None
    if position_ids is None:
        position_ids = torch.arange(n)
        if cu_seqlens is not None:
            document = torch.searchsorted(cu_seqlens.long(), position_ids, right=True) - 1
            position_ids = position_ids - cu_seqlens.long()[document]
    if position_ids.ndim not in (1, 2) or position_ids.shape[-1] != n or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids must be integers [{n}] or [B, {n}], global, got {position_ids.dtype} "
            f"{list(position_ids.shape)}."
        )
    rows = context.rows.to(position_ids.device)
    return position_ids.reshape(-1, n).index_select(1, rows).long().to(device)
