"""The `parallel` section."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fm_longctx.train.config.check import at_least

# Which engines know an option.
_ENGINES_OF = {
    "replicate": ("fsdp",),
    "tensor": ("fsdp", "megatron"),
    "pipeline": ("megatron",),
    "zero_stage": ("deepspeed",),
    "distributed_optimizer": ("megatron",),
    "reshard_after_forward": ("fsdp",),
}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work: tensor ranks inside context ranks inside data ranks; see docs/engines.md."""

    engine: Literal["fsdp", "deepspeed", "megatron"] = "fsdp"
    """Who holds the parameters: PyTorch's FSDP2; DeepSpeed's ZeRO; or Megatron-Core."""
    context: int = 1
    """Ranks that share one sequence. Must divide the number of ranks; the rest is data parallel."""
    replicate: int = 1
    """fsdp: replicas of the model, each sharded over ranks of its own (HSDP). Divides the data ranks."""
    tensor: int = 1
    """fsdp, megatron: ranks that split each layer's heads and MLP. They are neighbours: keep them within a host."""
    pipeline: int = 1
    """megatron: stages of consecutive layers."""
    zero_stage: Literal[1, 2, 3] | None = None
    """deepspeed: shard the optimizer's states (1), gradients too (2), parameters too (3). None: 3."""
    distributed_optimizer: bool = False
    """megatron: shard the optimizer's states over data and context ranks."""
    ranks: int | None = None
    """Ranks the job is meant for: another number is refused, and --dry-run plans for it. None: as many as started."""
    strategy: Literal["balanced", "zigzag", "contiguous"] = "balanced"
    """How a sequence is dealt to its context ranks; `launch/plan.py` compares them."""
    chunk_size: int | None = None
    """Tokens in the unit of sharding of a sequence. None: the planner chooses."""
    stages: int | None = None
    """Stages of the exchange, each overlapped with the attention of the one before. None: the planner chooses."""
    head_parallel: int | None = 1
    """Context ranks that split heads instead of keys (Ulysses). Must divide parallel.context and the query heads. null:
    the planner chooses for each batch, within a host."""
    reshard_after_forward: bool = True
    """fsdp: free a layer's gathered parameters after its forward and gather them again in its backward (as ZeRO-3)."""
    timeout_seconds: int = 600
    """How long a collective may wait for a rank before the job ends with an error."""

    def __post_init__(self) -> None:
        at_least(
            "parallel",
            1,
            context=self.context,
            replicate=self.replicate,
            tensor=self.tensor,
            pipeline=self.pipeline,
            ranks=self.ranks,
            chunk_size=self.chunk_size,
            stages=self.stages,
            head_parallel=self.head_parallel,
            timeout_seconds=self.timeout_seconds,
        )
        if self.head_parallel is not None and self.context % self.head_parallel:
            raise ValueError(
                f"parallel.head_parallel={self.head_parallel} does not divide parallel.context={self.context}. Set it "
                "to a divisor, or to 1 for none."
            )
        self._refuse_other_engines_options()
        if self.ranks is not None:
            self.data_ranks(self.ranks)

    def _refuse_other_engines_options(self) -> None:
        default = {field.name: field.default for field in fields(self)}
        for name, engines in _ENGINES_OF.items():
            if self.engine not in engines and getattr(self, name) != default[name]:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)} has no meaning for parallel.engine: {self.engine}. Leave "
                    f"it at {default[name]}, or set parallel.engine to {' or '.join(engines)}."
                )

    @property
    def plan_options(self) -> dict[str, Any]:
        """What `ShardPlan.build` is told of a sequence's layout."""
        return {
            "strategy": self.strategy,
            "chunk_size": self.chunk_size,
            "num_stages": self.stages,
            "head_parallel": "auto" if self.head_parallel is None else self.head_parallel,
        }

    def data_ranks(self, ranks: int) -> int:
        """Data-parallel ranks among so many; a ValueError if they cannot be laid out as asked."""
        if ranks % self.context:
            divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
            raise ValueError(
                f"parallel.context={self.context} does not divide the {ranks} ranks of this job. Set parallel.context "
                f"to one of {divisors}, or start a multiple of {self.context} ranks (torchrun --nproc-per-node)."
            )
        together = self.context * self.tensor * self.pipeline
        if ranks % together:
            raise ValueError(
                f"parallel.context={self.context} x parallel.tensor={self.tensor} x parallel.pipeline={self.pipeline} "
                f"do not divide the {ranks} ranks of this job. Start a multiple of {together} ranks."
            )
        data = ranks // together
        if data % self.replicate:
            raise ValueError(
                f"parallel.replicate={self.replicate} does not divide the {data} data ranks of this job. Set it to a "
                "divisor, or to 1 for none."
            )
        return data
