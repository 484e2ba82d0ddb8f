"""Packs of documents whose lengths follow a published pre-training mix."""

from __future__ import annotations

import random

# (longest length of the bin, share in percent); each bin starts after the one before.
LENGTH_MIX = [
    (10, 0.2),
    (50, 2.9),
    (100, 5.2),
    (200, 10.2),
    (500, 28.2),
    (1_000, 24.6),
    (2_000, 15.7),
    (4_000, 7.3),
    (8_000, 3.1),
    (16_000, 1.3),
    (32_000, 0.85),
    (64_000, 0.14),
    (128_000, 0.17),
    (192_000, 0.14),
]


def pack(num_tokens: int, seed: int) -> list[int]:
    """Document lengths that add up to num_tokens; the last one is cut off."""
    generator = random.Random(seed)
    bins = list(zip([1, *(longest + 1 for longest, _ in LENGTH_MIX)], LENGTH_MIX, strict=False))
    lengths: list[int] = []
    left = num_tokens
    while left:
        shortest, (longest, _) = generator.choices(bins, weights=[share for _, (_, share) in bins])[0]
        lengths.append(min(left, generator.randint(shortest, longest)))
        left -= lengths[-1]
    return lengths


def typical_seed(num_tokens: int, seeds: int = 20) -> int:
    """The seed below `seeds` whose pack's causal area is nearest to their mean: what packs cost on average.

    Areas vary several times over from pack to pack, and with them all that is measured on one.
    """
    area = {seed: sum(n * (n + 1) // 2 for n in pack(num_tokens, seed)) for seed in range(seeds)}
    mean = sum(area.values()) / seeds
    return min(area, key=lambda seed: abs(area[seed] - mean))
