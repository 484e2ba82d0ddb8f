"""Packing and balance on a published length distribution: padding, documents cut, how long data ranks wait. CPU only.

    python -m benchmarks.packing                          # 512M tokens of documents; 32K and 128K a sequence
    python -m benchmarks.packing --tokens 64 --lengths 32768 --steps 16

Lengths are those of `benchmarks.packs`. Nothing is tokenized or trained: every figure follows from token counts, and is
exact but for the times. The load is the sum over micro-batches of the heaviest data rank's attention area, over the sum
of the means: 1 is perfect; at 2 attention takes twice the time it could, as ranks meet in every micro-batch.
"""

from __future__ import annotations

import argparse
import time
from functools import cache

import numpy as np

from benchmarks.environment import environment
from benchmarks.packs import pack
from fm_longctx.data import PackedStream
from fm_longctx.data.turns import Turns

WINDOWS = (4, 16, 64, 256)
# (data ranks, micro-batches in a step, steps in the look-ahead); None: no balance. One sequence a rank is refused.
BALANCE = [
    (ranks, accumulation, steps)
    for ranks in (8, 32)
    for accumulation in (1, 4)
    for steps in (None, 1, 4, 16)
    if (accumulation, steps) != (1, 1)
]


class Counts:
    """Documents that are nothing but their lengths."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        self.counts = np.array(pack(num_tokens, seed), dtype=np.int64)

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "counts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="millions of tokens in all documents")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--steps", type=int, default=64, help="steps of which the load is counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()
    print(environment(options.commit))
    documents = Counts(options.tokens * 10**6, options.seed)
    counts = documents.counts
    print(f"\n{len(counts):,} documents, {counts.sum():,} tokens, mean {counts.mean():,.0f}, longest {counts.max():,}")
    print("\n| sequence | packing | padding | documents cut | of those that fit | mean area | ms a sequence |")
    print("|---|---|---|---|---|---|---|")
    for length in options.lengths:
        print(packing_line("concat", PackedStream(documents, sequence_length=length, seed=0)), flush=True)
        for window in WINDOWS:
            stream = PackedStream(documents, sequence_length=length, seed=0, packing="best_fit", window=window)
            print(packing_line(f"best_fit, window {window}", stream), flush=True)
    print("\n| sequence | packing | data ranks | micro-batches | look-ahead | load | worst step |")
    print("|---|---|---|---|---|---|---|")
    for length in options.lengths:
        for packing in ("concat", "best_fit"):
            stream = PackedStream(documents, sequence_length=length, seed=0, packing=packing)  # type: ignore[arg-type]
            stream.area = cache(stream.area)  # type: ignore[method-assign]
            for ranks, accumulation, ahead in BALANCE:
                print(balance_line(stream, packing, ranks, accumulation, ahead, options.steps), flush=True)


def packing_line(name: str, stream: PackedStream) -> str:
    """Over about one epoch."""
    length, counts = stream.sequence_length, stream.documents.counts
    number = max(1, stream.epoch_tokens // length)
    began = time.process_time()
    sequences = [stream.layout.pieces(i) for i in range(number)]
    milliseconds = 1e3 * (time.process_time() - began) / number
    used = sum(piece.length for pieces in sequences for piece in pieces)
    cut = {p.document for pieces in sequences for p in pieces if p.length < counts[p.document]}
    area = np.mean([stream.area(i) for i in range(number)]) / (length * (length + 1) / 2)
    longer = int((counts > length).sum())
    return (
        f"| {length:,} | {name} | {1 - used / (number * length):.2%} | {len(cut):,} | "
        f"{len([d for d in cut if counts[d] <= length]):,} of {len(counts) - longer:,} | {area:.1%} of causal | "
        f"{milliseconds:.2f} |"
    )


def balance_line(
    stream: PackedStream, packing: str, ranks: int, accumulation: int, ahead: int | None, steps: int
) -> str:
    """Over so many steps, a look-ahead of `ahead` of them."""
    step = ranks * accumulation
    turns = Turns(
        stream,
        ranks=ranks,
        batch_size=1,
        accumulation=accumulation,
        balance="none" if ahead is None else "area",
        lookahead=None if ahead is None else ahead * step,
    )
    heaviest, mean = [], []
    for _ in range(steps):
        taken = [turns.next().sequences for _ in range(accumulation)]
        areas = np.array([[stream.area(i) for (i,) in batch] for batch in taken], dtype=np.float64)
        heaviest.append(areas.max(1).sum())
        mean.append(areas.mean(1).sum())
    window = "no balance" if ahead is None else f"{ahead} step{'s' * (ahead > 1)}, {turns.window:,} sequences"
    return (
        f"| {stream.sequence_length:,} | {packing} | {ranks} | {accumulation} | {window} | "
        f"{sum(heaviest) / sum(mean):.3f} | {max(h / m for h, m in zip(heaviest, mean, strict=True)):.2f} |"
    )


if __name__ == "__main__":
    main()
