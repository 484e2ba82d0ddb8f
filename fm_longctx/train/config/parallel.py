"""The `parallel` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fm_longctx.train.config.check import at_least


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work: a (data, context) mesh; parameters are sharded over all of it (FSDP2)."""

    context: int = 1
    """Ranks that share one sequence. Must divide the number of ranks; the rest is data parallel."""
    ranks: int | None = None
    """Ranks the job is meant for: another number is refused, and --dry-run plans for it. None: as many as started."""
    strategy: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    """How a sequence is dealt to its context ranks; `launch/plan.py` compares them."""
    chunk_size: int | None = None
    """Tokens in the unit of sharding of a sequence. None: the planner chooses."""
    stages: int | None = None
    """Stages of the exchange, each overlapped with the attention of the one before. None: the planner chooses."""
    head_parallel: int = 1
    """Context ranks that split heads instead of keys (Ulysses). Must divide parallel.context and the query heads."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward and gather them again in its backward (FSDP2; ZeRO-3)."""
    timeout_seconds: int = 600
    """How long a collective may wait for a rank before the job ends with an error."""

    def __post_init__(self) -> None:
        at_least(
            "parallel",
            1,
            context=self.context,
            ranks=self.ranks,
            chunk_size=self.chunk_size,
            stages=self.stages,
            head_parallel=self.head_parallel,
            timeout_seconds=self.timeout_seconds,
        )
        if self.context % self.head_parallel:
            raise ValueError(
                f"parallel.head_parallel={self.head_parallel} does not divide parallel.context={self.context}. Set it "
                "to a divisor, or to 1 for none."
            )
        if self.ranks is not None:
            self.data_ranks(self.ranks)

    @property
    def plan_options(self) -> dict[str, Any]:
        """What `ShardPlan.build` is told of a sequence's layout."""
        return {
            "strategy": self.strategy,
            "chunk_size": self.chunk_size,
            "num_stages": self.stages,
            "head_parallel": self.head_parallel,
        }

    def data_ranks(self, ranks: int) -> int:
        """Data-parallel ranks among so many; a ValueError if the context ranks do not divide them."""
        if ranks % self.context:
            divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
            raise ValueError(
                f"parallel.context={self.context} does not divide the {ranks} ranks of this job. Set parallel.context "
                f"to one of {divisors}, or start a multiple of {self.context} ranks (torchrun --nproc-per-node)."
            )
        return ranks // self.context
