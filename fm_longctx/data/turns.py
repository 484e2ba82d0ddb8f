"""Which sequences each data rank takes in which micro-batch: in order, or balanced by area within a look-ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from fm_longctx.data.order import shuffled
from fm_longctx.data.sequence import Stream

Balance = Literal["none", "area"]

_STEPS = 2  # keeps the shuffles of steps apart from those of documents and windows


@runtime_checkable
class Measured(Protocol):
    """A stream that knows a sequence's area without making it."""

    def area(self, index: int) -> int:
        """Unmasked scores of sequence `index`."""
        ...


class Turn(NamedTuple):
    """One micro-batch over all data ranks."""

    sequences: tuple[tuple[int, ...], ...]
    """B sequences of each data rank."""
    state: dict[str, Any]
    """What `Turns.restore` needs to go on after it."""


class Turns:
    """Micro-batches of B sequences for each of D data ranks, without end; the same on every rank.

    Without balance micro-batch m takes the next D x B sequences, rank d those from d x B on. With it they are taken a
    window at a time: the next `lookahead` sequences, rounded up to whole steps of G micro-batches. Within a window
    sequences of like area share a micro-batch, and its ranks get like sums, so that no rank waits long for another. The
    steps of a window, each with light and heavy micro-batches where G allows, come in a shuffled order.

    Every sequence has its turn exactly once, whatever the number of ranks, and less than a window before or after its
    turn without balance. With a window of one step (the default) every step has the very sequences that it has without
    balance. A run that goes on with another D, B, G or window first plans anew what the old window had left.

    Args:
        stream: where areas come from; one that is not `Measured` has to make its sequences to tell.
        ranks: D.
        batch_size: B.
        accumulation: G, micro-batches in an optimizer step.
        balance: none or area.
        lookahead: sequences over all ranks; None: one step.

    Raises:
        ValueError: a number below 1, or a look-ahead that has nothing to balance.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        ranks: int,
        batch_size: int,
        accumulation: int = 1,
        balance: Balance = "none",
        lookahead: int | None = None,
    ) -> None:
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {accumulation}.")
        if balance not in ("none", "area"):
            raise ValueError(f"balance must be none or area, got {balance!r}.")
        if lookahead is not None and (balance == "none" or lookahead < 1):
            raise ValueError(f"lookahead must be at least 1 and needs balance: area, got {lookahead} with {balance}.")
        self.stream, self.ranks, self.batch_size, self.accumulation = stream, ranks, batch_size, accumulation
        self.balance = balance
        group = ranks * batch_size
        step = group * accumulation
        self.window = -(-(lookahead or step) // step) * step if balance == "area" else group
        """Sequences that are planned together."""
        if balance == "area" and ranks > 1 and batch_size == 1 and self.window == group:
            raise ValueError(
                f"balance: area has nothing to balance: a look-ahead of {self.window} is one sequence for each of the "
                f"{ranks} data ranks. Set lookahead to several times that, or use more micro-batches a step."
            )
        self._pending: list[int] = []
        self._next = 0

    @property
    def plan(self) -> list[Any]:
        """What decides the order within a window."""
        return [self.balance, self.ranks, self.batch_size, self.accumulation, self.window]

    def next(self) -> Turn:
        """The next micro-batch."""
        if not self._pending:
            self._plan([])
        group = self.ranks * self.batch_size
        taken, self._pending = self._pending[:group], self._pending[group:]
        b = self.batch_size
        sequences = tuple(tuple(taken[d * b : (d + 1) * b]) for d in range(self.ranks))
        return Turn(sequences=sequences, state=self.state())

    def state(self) -> dict[str, Any]:
        """`next_sequence`: none from there on is planned yet; `pending`: planned and not taken yet, in order."""
        return {"next_sequence": self._next, "pending": list(self._pending), "plan": self.plan}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = int(state["next_sequence"])
        self._pending = [int(index) for index in state["pending"]]
        if self._pending and state["plan"] != self.plan:
            self._plan(sorted(self._pending))

    def _plan(self, left: list[int]) -> None:
        """Fill a window, with what an earlier one left first, and set its order."""
        size = -(-max(len(left), self.window) // self.window) * self.window
        fresh = range(self._next, self._next + size - len(left))
        self._next += len(fresh)
        window = [*left, *fresh]
        self._pending = window if self.balance == "none" else self._balanced(window)

    def _balanced(self, window: list[int]) -> list[int]:
        areas = {index: self._area(index) for index in window}
        window = sorted(window, key=lambda index: (-areas[index], index))
        group = self.ranks * self.batch_size
        groups = [window[i : i + group] for i in range(0, len(window), group)]
        num_steps = len(groups) // self.accumulation
        # Dealt like cards, back and forth: each step gets one of the heaviest, one of the next, ...
        steps: list[list[list[int]]] = [[] for _ in range(num_steps)]
        for i, members in enumerate(groups):
            turn, at = divmod(i, num_steps)
            steps[at if turn % 2 == 0 else num_steps - 1 - at].append(deal(members, areas, self.ranks))
        order = shuffled(num_steps, min(window), len(window), _STEPS)
        return [index for i in order for members in steps[i] for index in members]

    def _area(self, index: int) -> int:
        if isinstance(self.stream, Measured):
            return self.stream.area(index)
        return int(self.stream.sequence(index).mask.area().sum())


def deal(members: Sequence[int], areas: dict[int, int], ranks: int) -> list[int]:
    """The members, heaviest first, each to the lightest rank that has room; then rank after rank.

    >>> deal([7, 8, 9, 5], {7: 10, 8: 6, 9: 5, 5: 2}, ranks=2)
    [7, 5, 8, 9]
    """
    room = len(members) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for index in members:
        rank = min((r for r in range(ranks) if len(held[r]) < room), key=lambda r: (sums[r], r))
        held[rank].append(index)
        sums[rank] += areas[index]
    return [index for rank in held for index in rank]


def first_needed(state: dict[str, Any]) -> int:
    """The earliest sequence that has not had its turn in a state of `Turns`."""
    return int(min([*state["pending"], state["next_sequence"]]))
