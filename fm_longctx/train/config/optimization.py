"""The `optimizer` and `schedule` sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fm_longctx.train.config.check import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. Weight decay applies to matrices, not to norm weights."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Per step, times the learning rate."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm, taken over all parameters and ranks. None: not at all."""

    def __post_init__(self) -> None:
        above_zero("optimizer", lr=self.lr, eps=self.eps)
        at_least("optimizer", 0, weight_decay=self.weight_decay)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {beta}.")
        if self.clip_norm is not None:
            above_zero("optimizer", clip_norm=self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of optimizer.lr."""

    kind: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warmup: constant; half a cosine down to the end; or stable, then linear over decay_steps (wsd)."""
    warmup_steps: int = 0
    """Linear rise at the start; the first step has 1 / warmup_steps of the peak."""
    decay_steps: int = 0
    """Steps of the fall at the end, for wsd."""
    final_fraction: float = 0.1
    """The factor that the fall would reach one step past the end."""

    def __post_init__(self) -> None:
        at_least("schedule", 0, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction must be in [0, 1], got {self.final_fraction}.")
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"schedule.decay_steps is the length of wsd's fall: at least 1 with kind: wsd and 0 otherwise, got "
                f"{self.decay_steps} with kind: {self.kind}."
            )
