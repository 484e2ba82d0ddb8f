"""Random eviction rows: a matching of columns and rows, drawn at random."""

import random

import torch
from torch import Tensor


def draw_evictions(length: int, draws: int, seed: int) -> Tensor:
    """Eviction row of each column, int32 `[draws, length]`; `length` where the column stays.

    Per draw, `length // 2` columns get different rows from `[length // 2, length)`, each row greater than its column.
    """
    rows = torch.full((draws, length), length, dtype=torch.int32)
    generator = random.Random(seed)
    half = length // 2
    for draw in range(draws):
        # The last column has no row below it. Any other choice of columns can be served: taken from the last to the
        # first, a column never finds fewer rows below it than there are columns at or after it.
        columns = sorted(generator.sample(range(length - 1), half), reverse=True) if half else []
        free: list[int] = []
        next_row = length - 1
        chosen: list[int] = []
        for column in columns:
            while next_row > column and next_row >= half:
                free.append(next_row)
                next_row -= 1
            pick = int(generator.random() * len(free))
            free[pick], free[-1] = free[-1], free[pick]
            chosen.append(free.pop())
        rows[draw, columns] = torch.tensor(chosen, dtype=torch.int32)
    return rows
