"""What attention layers are handed when one sequence is spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

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
        check: compare plan and mask across the ranks, one small collective that waits for all of them. Ranks that
            disagree would exchange the wrong keys, or hang.

    Raises:
        ValueError: plan, mask and group do not fit together. With `check` it is raised on every rank if it is raised on
            one, and names the ranks that differ.
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
            self._compare(identity, group)
        if problem is not None:
            raise problem
        if device is None:
            device = "cpu" if mask is None else mask.device
        self.num_tokens: int = part.num_tokens
        """N, the length of the whole sequence."""
        self.rows = part.rows
        """int64 `[T]` on the CPU: the rank's positions, ascending."""
        self.stages: tuple[Stage, ...] = tuple(stage.to(device) for stage in part.stages)
        """What to exchange and what to attend to, on the device."""

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

    def _compare(self, identity: str, group: dist.ProcessGroup) -> None:
        everyone: list[str] = [""] * self.world_size
        dist.all_gather_object(everyone, identity, group=group)
        differing = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if differing:
            told = "; ".join(f"rank {rank}: {everyone[rank]}" for rank in [0, *differing])
            raise ValueError(
                f"the ranks disagree about mask or plan: {differing} hold another than rank 0 ({told}). Build both "
                "from the same batch on every rank of the group."
            )
