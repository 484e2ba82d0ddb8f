"""What attention layers are handed when one sequence is spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fm_longctx.context_parallel.agreement import compare
from fm_longctx.context_parallel.plan import ShardPlan
from fm_longctx.context_parallel.stages import RankPlan, Stage
from fm_longctx.mask.flash_mask import FlashMask


class ContextParallel:
    """A process group, and this rank's part of a plan under one mask, on the device. Made once per batch.

        plan = ShardPlan.build(mask, world_size)
        context = ContextParallel(group, plan, mask, device="cuda")
        out = context_parallel_attention(q, k, v, context)      # in every layer

    A model whose layers have several masks makes one context for each, under one plan built from all of them.

    Args:
        group: the ranks that share the sequence. None: no process group, one rank that holds it all.
        plan: the plan, or this rank's part of it (`plan.local(rank, mask)`, made in a loader's worker).
        mask: the global mask; the first of the plan's if not given. None with a rank's part, which has its mask.
        device: where attention will run; the mask's device, or the CPU, if not given.
        check: compare plan and mask across the ranks here, and dtype and shape at the first attention: 16 bytes a rank
            each, once a batch, on the CPU: it waits for the other ranks' hosts but for no kernel. Ranks that disagree
            would exchange the wrong keys, or hang.

    Raises:
        ValueError: plan, mask and group do not fit together. With `check` it is raised on every rank if it is raised on
            one, and names the ranks that differ.
        RuntimeError: a rank is gone, or did not come within the group's timeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        plan: ShardPlan | RankPlan,
        mask: FlashMask | None = None,
        *,
        device: torch.device | str | None = None,
        check: bool = True,
    ) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        problem: ValueError | None = None
        try:
            part = self._part(plan, mask)
            identity = part.fingerprint
        except ValueError as error:
            problem, identity = error, f"error: {error}"
        if check and group is not None:
            # Before raising our own: the others are waiting, and must raise too.
            compare(identity, group, "mask or plan")
        if problem is not None:
            raise problem
        if device is None:
            device = "cpu" if mask is None else mask.device
        self.num_tokens: int = part.num_tokens
        """N, the length of the whole sequence."""
        self.rows = part.rows
        """int64 `[T]` on the CPU: the rank's positions, ascending."""
        self.member_counts = part.member_counts
        """Rows of each member of the rank's ring; see `ShardPlan`."""
        self.stages: tuple[Stage, ...] = tuple(stage.to(device) for stage in part.stages)
        """What to exchange and what to attend to, on the device; of the whole ring."""
        self._unchecked = check and group is not None
        self._of_heads: dict[tuple[int, int], tuple[Stage, ...]] = {}

    @property
    def members(self) -> int:
        """Ranks that share rows and split heads: 1 without head parallelism."""
        return len(self.member_counts)

    def agree(self, inputs: str) -> None:
        """Compare what goes into attention (dtype and shape, in words) across the ranks, the first time only."""
        if self._unchecked and self.group is not None:
            self._unchecked = False
            compare(inputs, self.group, "the inputs of attention")

    def stages_of(self, heads: int, kv_heads: int) -> tuple[Stage, ...]:
        """The stages under the masks of this member's part of so many heads: the same ones for one mask head."""
        mask_heads = self.stages[0].mask.heads
        if self.members == 1 or mask_heads == 1:
            return self.stages
        key = (heads, kv_heads)
        if key not in self._of_heads:
            if mask_heads not in (heads, kv_heads):
                raise ValueError(
                    f"the mask's heads must be 1, {kv_heads} (key/value heads) or {heads} (query heads), got "
                    f"{mask_heads}."
                )
            member = self.rank % self.members
            width = max(1, mask_heads // self.members)
            first = member * mask_heads // self.members
            self._of_heads[key] = tuple(stage.of_heads(first, first + width) for stage in self.stages)
        return self._of_heads[key]

    def _part(self, plan: ShardPlan | RankPlan, mask: FlashMask | None) -> RankPlan:
        if not isinstance(plan, (ShardPlan, RankPlan)):
            raise ValueError(f"plan must be a ShardPlan or a RankPlan, got {type(plan).__name__}.")
        if plan.world_size != self.world_size:
            hint = "None is one rank; pass dist.group.WORLD for all." if self.group is None else "Build one for it."
            raise ValueError(f"the plan is for {plan.world_size} ranks but the group has {self.world_size}. {hint}")
        if isinstance(plan, ShardPlan):
            return plan.local(self.rank, mask)
        if mask is not None:
            raise ValueError("a RankPlan holds its mask already: leave mask out, or pass the ShardPlan.")
        if plan.rank != self.rank:
            raise ValueError(f"this is rank {self.rank} of the group but the plan is rank {plan.rank}'s part.")
        return plan
