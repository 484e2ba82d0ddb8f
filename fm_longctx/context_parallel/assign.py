"""Which rank owns which chunk: equal tokens, equal area, and keys that a rank already needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fm_longctx.context_parallel.coverage import Ints

# Area that a rank may have above the mean, as a share of it, while chunks go where they cost the least traffic.
TOLERANCE = 0.02


def assign(area: Ints, visible: Ints, odd: npt.NDArray[np.bool_], world_size: int) -> Ints:
    """Rank of each chunk, int64 `[chunks]`. Deterministic.

    The heaviest chunk first, each to the rank that must receive the fewest further columns for it, among those that
    have room for its tokens and its area. Late chunks of a long document are heavy and see the same keys, so a rank
    collects them until its area is full, and short documents fill its tokens.

    Args:
        area: unmasked scores of each row chunk, `[chunks]`.
        visible: columns of chunk c that row chunk r sees, `[chunks, chunks]`.
        odd: `[chunks]`, the chunks of another size than the rest; a rank owns at most one of them.
        world_size: ranks; every one owns the same number of chunks that are not odd.
    """
    chunks = len(area)
    room = np.empty((2, world_size), dtype=np.int64)
    room[0] = (chunks - int(odd.sum())) // world_size
    room[1] = 1
    limit = area.sum() / world_size * (1 + TOLERANCE)
    lightest = np.concatenate([np.zeros(1), np.sort(area).cumsum()])
    first = (visible > 0).argmax(1)
    last = chunks - (visible[:, ::-1] > 0).argmax(1)

    owner = np.full(chunks, -1)
    load = np.zeros(world_size)
    received = np.zeros((world_size, chunks), dtype=np.int64)
    for i, chunk in enumerate(np.argsort(-area, kind="stable")):
        kind = int(odd[chunk])
        free = np.flatnonzero(room[kind] > 0)
        # The area that filling the rank's tokens will bring at least, at the mean of what is left.
        left = chunks - i - 1
        later = (room[:, free].sum(0) - 1) * (lightest[left] / max(left, 1))
        fits = load[free] + area[chunk] + later <= limit
        free, later = (free[fits], later[fits]) if fits.any() else (free, later)
        band = slice(first[chunk], last[chunk])
        extra = np.maximum(visible[chunk, band] - received[free, band], 0).sum(1)
        cost = extra if fits.any() else load[free] + later
        rank = free[np.lexsort((load[free], cost))[0]]
        owner[chunk] = rank
        load[rank] += area[chunk]
        room[kind, rank] -= 1
        received[rank, band] = np.maximum(received[rank, band], visible[chunk, band])
    return owner
