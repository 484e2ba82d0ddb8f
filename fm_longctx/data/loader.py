"""This rank's batches, made ahead of the step: tokens, labels, positions, mask and plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fm_longctx.context_parallel.ahead import Ahead
from fm_longctx.context_parallel.plan import ShardPlan
from fm_longctx.context_parallel.stages import RankPlan, pinned
from fm_longctx.data.sequence import IGNORED, Stream
from fm_longctx.data.turns import Balance, Turn, Turns, first_needed
from fm_longctx.mask import FlashMask


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch as one rank sees it. T is this rank's share of the N tokens of each of the B sequences."""

    tokens: Tensor
    """int64 `[B, T]`."""
    labels: Tensor
    """int64 `[B, T]`, shifted already; `IGNORED` where nothing is predicted."""
    positions: Tensor
    """int64 `[B, T]`, restarting with each document."""
    mask: FlashMask
    """The mask of the whole sequences, `[B, 1, K, N]`."""
    plan: ShardPlan
    """Which context rank holds which rows."""
    local: RankPlan
    """This rank's part of the plan: what it exchanges, and its local masks."""
    num_labels: int
    """Labels that are not ignored, in the B whole sequences."""
    num_tokens: int
    """B x N."""
    visible_area: int
    """Unmasked scores of the B sequences, of one head."""
    num_padding: int
    """Tokens of the B sequences that only fill them."""
    sequences: tuple[int, ...]
    """Index of each sequence in the stream."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """`[B, T]` each: what else the stream gives for each token."""
    about: tuple[Any, ...] = ()
    """What else the stream says of each sequence; stays on the CPU."""
    ahead: Ahead[Batch] | None = None
    """A copy of all this on a GPU, if one was begun."""

    @property
    def num_scores(self) -> int:
        """B x N x N: what `visible_area` is a share of."""
        return len(self.sequences) * self.mask.num_rows * self.mask.num_columns

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors, mask and local part on a device; the copy that was begun if there is one."""
        if self.ahead is not None and self.ahead.device == device:
            return self.ahead.take()
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            mask=self.mask.to(device),
            local=self.local.to(device),
            extra={name: values.to(device, non_blocking=True) for name, values in self.extra.items()},
            ahead=None,
        )

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory. Needs a GPU."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            positions=self.positions.pin_memory(),
            mask=pinned(self.mask),
            local=self.local.pin_memory(),
            extra={name: values.pin_memory() for name, values in self.extra.items()},
        )

    def tensors(self) -> Iterator[Tensor]:
        """All that `to` moves."""
        yield from (self.tokens, self.labels, self.positions, self.mask.starts, self.mask.ends, *self.extra.values())
        yield from self.local.tensors()


@runtime_checkable
class Bookmarked(Protocol):
    """A stream that needs more than an index to come to a sequence soon."""

    def bookmark(self, index: int) -> dict[str, Any]:
        """What `restore` needs for sequence `index` and later ones, in what JSON can hold; the same on every rank."""
        ...

    def restore(self, bookmark: dict[str, Any]) -> None: ...


@runtime_checkable
class Releasing(Protocol):
    """A stream that keeps sequences until they have had their turn."""

    def release(self, index: int) -> None:
        """No sequence before `index` will be asked for again."""
        ...


class Loader(Iterator[Batch]):
    """Endless, resumable batches for one rank. The next ones are made by threads while the current one trains.

    Micro-batch m of the run takes dp_size x B sequences of the stream, the next ones or as `Turns` balances them: data
    rank d takes B of them, and the context ranks of one data rank share these, each with its own rows. The state says
    which sequences have had their turn, so a run resumes at the exact sample on any number of ranks.

    Threads are enough: tokenizers, torch and file reading let each other run.

    Args:
        stream: where sequences come from.
        batch_size: B, sequences of one data rank in a micro-batch.
        dp_rank, dp_size: which data rank this is, of how many.
        cp_rank, cp_size: which context rank this is, of how many.
        plan_options: further arguments of `ShardPlan.build`, such as `chunk_size`; none lets the plan choose.
        accumulation, balance, lookahead: see `Turns`.
        workers: threads that make batches, >= 1.
        prefetch: batches that are ready or being made ahead of the one handed out; 0 makes each when it is asked for.
        copy_to: a GPU that the threads copy each batch to when it is made, on a stream of their own: `Batch.to` of that
            device then finds it there.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        plan_options: Mapping[str, Any] | None = None,
        accumulation: int = 1,
        balance: Balance = "none",
        lookahead: int | None = None,
        workers: int = 1,
        prefetch: int = 1,
        copy_to: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if workers < 1 or prefetch < 0:
            raise ValueError(f"workers must be at least 1 and prefetch at least 0, got {workers} and {prefetch}.")
        for name, rank, size in (("dp", dp_rank, dp_size), ("cp", cp_rank, cp_size)):
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank must be in [0, {name}_size), got {rank} of {size}.")
        self.stream, self.batch_size, self.plan_options = stream, batch_size, dict(plan_options or {})
        self.dp_rank, self.dp_size, self.cp_rank, self.cp_size = dp_rank, dp_size, cp_rank, cp_size
        self.prefetch, self.copy_to = prefetch, copy_to
        self._turns = Turns(
            stream,
            ranks=dp_size,
            batch_size=batch_size,
            accumulation=accumulation,
            balance=balance,
            lookahead=lookahead,
        )
        self._state = self._turns.state()
        # Turns are taken one after the other by a thread of their own: a window's areas may take a while.
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fm_longctx-turns")
        self._workers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="fm_longctx-loader")
        self._ahead: deque[tuple[Future[Turn], Future[Batch]]] = deque()

    def __next__(self) -> Batch:
        self._fill(1)
        turn, batch = self._ahead.popleft()
        made = batch.result()
        self._state = turn.result().state
        if isinstance(self.stream, Releasing):
            # What is being made ahead is in the state too.
            self.stream.release(first_needed(self._state))
        self._fill(self.prefetch)
        return made

    def _fill(self, wanted: int) -> None:
        while len(self._ahead) < wanted:
            turn = self._planner.submit(self._turns.next)
            self._ahead.append((turn, self._workers.submit(self._take, turn)))

    def _take(self, turn: Future[Turn]) -> Batch:
        batch = self._batch(turn.result().sequences[self.dp_rank])
        return batch if self.copy_to is None else replace(batch, ahead=Ahead(batch, self.copy_to))

    def make(self, first: int) -> Batch:
        """The micro-batch whose first sequence, over all data ranks, is `first`; not balanced. Moves nothing."""
        start = first + self.dp_rank * self.batch_size
        return self._batch(tuple(range(start, start + self.batch_size)))

    def _batch(self, sequences: tuple[int, ...]) -> Batch:
        packed = [self.stream.sequence(i) for i in sequences]
        mask = FlashMask.stack([p.mask for p in packed])
        plan = ShardPlan.build(mask, self.cp_size, **self.plan_options)
        plan.received_fraction  # noqa: B018  (computed and kept here, ahead of the step that reports it)

        def shard(values: list[Tensor]) -> Tensor:
            return plan.shard(torch.stack(values), self.cp_rank, 1)

        return Batch(
            tokens=shard([p.tokens for p in packed]),
            labels=shard([p.labels for p in packed]),
            positions=shard([p.positions for p in packed]),
            mask=mask,
            plan=plan,
            local=plan.local(self.cp_rank),
            num_labels=sum(int((p.labels != IGNORED).sum()) for p in packed),
            num_tokens=self.batch_size * self.stream.sequence_length,
            visible_area=int(mask.area().sum()) // mask.heads,
            num_padding=sum(p.num_padding for p in packed),
            sequences=sequences,
            extra={name: shard([p.extra[name] for p in packed]) for name in packed[0].extra},
            about=tuple(p.about for p in packed),
        )

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out, whatever was prefetched; the same on every rank."""
        state = {**self._state, "data": self.stream.fingerprint()}
        if isinstance(self.stream, Bookmarked):
            state["bookmark"] = self.stream.bookmark(first_needed(self._state))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, of a run with any number of ranks.

        Raises:
            ValueError: the state belongs to other documents, another sequence length, packing or seed.
        """
        if state["data"] != self.stream.fingerprint():
            raise ValueError(
                "the saved data position belongs to other data: the documents, the tokenizer, data.sequence_length, "
                "data.packing, data.window and data.seed must be those of the run that saved it."
            )
        self._drop()
        if isinstance(self.stream, Bookmarked):
            self.stream.restore(state["bookmark"])
        self._planner.submit(self._turns.restore, state).result()
        self._state = {name: state[name] for name in ("next_sequence", "pending", "plan")}

    def close(self) -> None:
        """Stop the threads; batches being made are dropped."""
        self._drop()
        for pool in (self._planner, self._workers):
            pool.shutdown(wait=True, cancel_futures=True)

    def _drop(self) -> None:
        """Forget what was made ahead, when nothing is being made any more: a late reader would move the stream."""
        futures: list[Future[Any]] = [future for pair in self._ahead for future in pair]
        for future in futures:
            future.cancel()
        wait(futures)
        self._ahead.clear()
