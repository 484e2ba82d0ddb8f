"""What masks mean, written from the words with plain loops: nothing of the package is used here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

INT32 = (-(2**31), 2**31 - 1)


class Raw(NamedTuple):
    """Arguments of `FlashMask`: any integers for bounds, canonical or not."""

    starts: Tensor
    ends: Tensor
    causal: bool
    num_rows: int


def dense_of_intervals(raw: Raw) -> Tensor:
    """Bool `[B, H, N_q, N_k]`: the loop that defines the format."""
    b, h, k, n_k = raw.starts.shape
    visible = torch.ones(b, h, raw.num_rows, n_k, dtype=torch.bool)
    starts, ends = raw.starts.tolist(), raw.ends.tolist()
    for i in range(b):
        for j in range(h):
            for c in range(n_k):
                for r in range(raw.num_rows):
                    hidden = any(starts[i][j][x][c] <= r < ends[i][j][x][c] for x in range(k))
                    above = raw.causal and r < c - (n_k - raw.num_rows)
                    visible[i, j, r, c] = not (hidden or above)
    return visible


def dense_of_words(n_q: int, n_k: int, sees: Callable[[int, int], bool]) -> Tensor:
    """Bool `[N_q, N_k]` of a predicate (row, column)."""
    rows = [[bool(sees(r, c)) for c in range(n_k)] for r in range(n_q)]
    return torch.tensor(rows, dtype=torch.bool).view(n_q, n_k)


def runs(flags: list[bool]) -> int:
    """How many runs of True."""
    return sum(flag and (i == 0 or not flags[i - 1]) for i, flag in enumerate(flags))


@st.composite
def raw_masks(draw: st.DrawFn, *, max_intervals: int = 4, shape: tuple[int, int, int, int] | None = None) -> Raw:
    """Adversarial intervals: empty, touching, overlapping, inverted, out of range, whole columns, in no order."""
    b, h, n_q, n_k = shape or (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 9)),
    )
    k = draw(st.integers(0, max_intervals))
    near = st.integers(-2, n_q + 2)
    pair = st.one_of(
        st.tuples(near, near),
        st.sampled_from([(0, n_q), INT32, (INT32[1], INT32[0]), (n_q, n_q), (0, 0), (0, 1), (n_q - 1, n_q)]),
    )
    count = b * h * k * n_k
    pairs = draw(st.lists(pair, min_size=count, max_size=count))
    starts = torch.tensor([s for s, _ in pairs], dtype=torch.int32).view(b, h, k, n_k)
    ends = torch.tensor([e for _, e in pairs], dtype=torch.int32).view(b, h, k, n_k)
    return Raw(starts, ends, draw(st.booleans()), n_q)


def index_of_part(lengths: list[int]) -> list[int]:
    """For each position, the index of the part it lies in."""
    return [i for i, length in enumerate(lengths) for _ in range(length)]
