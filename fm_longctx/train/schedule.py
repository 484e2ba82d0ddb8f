"""The learning rate over the steps."""

from __future__ import annotations

import math

from fm_longctx.train.config import ScheduleConfig


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Factor of the peak learning rate for step 0..steps-1: a pure function, so a schedule has no state to save.

    >>> cosine = ScheduleConfig(kind="cosine", warmup_steps=2, final_fraction=0.0)
    >>> [round(learning_rate_factor(s, 6, cosine), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    fall = config.decay_steps if config.kind == "wsd" else steps - config.warmup_steps
    done = (step - (steps - fall)) / fall
    if done <= 0:
        return 1.0
    left = 1 - done if config.kind == "wsd" else (1 + math.cos(math.pi * done)) / 2
    return config.final_fraction + (1 - config.final_fraction) * left
