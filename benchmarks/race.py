"""One cell: competitors are checked, then timed in turn, in this process, with the same timer, inputs and mask."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cells import Cell, Scenario, scenario
from benchmarks.peers import Inputs, Peer, make_inputs
from benchmarks.sampled_check import Expected, errors, expected
from benchmarks.timing import Timer, Timing

OK, WRONG, FAILED, REFUSED = "ok", "wrong", "failed", "refused"


class ContextLost(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A competitor that has passed its check: its row so far, and what is to be timed, each run once before."""

    row: dict[str, Any]
    forward: Callable[[], object]
    first_forward: float
    backward: Callable[[], object] | None
    first_backward: float


def race(
    cell: Cell, peers: Sequence[Peer], device: str, timer: Timer, announce: Callable[[str], None] = lambda name: None
) -> Iterator[dict[str, Any]]:
    """One row a competitor: `status`, and times in ms if it is `ok`. One that fails is a row with the error's text.

    Each is checked by itself; then those that are right are timed in turn, repetition by repetition. The forward is
    timed as in training, with what the backward needs kept; the backward by `torch.autograd.grad` for a fixed dout.
    `timed_seconds` is what the repetitions took. `announce` hears whose check begins. What goes wrong while they are
    timed is in the rows of all, for they share the device's queue.

    Raises:
        ContextLost: after the rows of whoever left the GPU unusable.
    """
    mask = scenario(cell.case, cell.n, cell.seed)
    area = int(mask.case.mask.area().sum())
    common: tuple[Inputs, Expected] | None = None
    ready: list[_Ready] = []
    for peer in peers:
        announce(peer.name)
        row: dict[str, Any] = {"competitor": peer.name, "area": area}
        try:
            reason = peer.refusal(cell, mask, device)
            if reason is not None:
                row |= {"status": REFUSED, "note": reason}
            else:
                if common is None:
                    inputs = make_inputs(cell, device)
                    common = inputs, expected(*inputs, mask.case.visible)
                found = _check(peer, common[0], mask, common[1], timer)
                row |= found.row
                ready += [replace(found, row=row)] if row["status"] == OK else []
                del found
        except Exception as error:  # whatever a competitor raises is its result
            row |= {"status": FAILED, "note": describe(error)}
        if row["status"] != OK:
            yield row
        _settle(device, f"{peer.name} on {cell.key}", failed=row["status"] == FAILED)
    try:
        rows = _time(ready, timer)
    except Exception as error:
        rows = [one.row | {"status": FAILED, "note": f"while all were timed: {describe(error)}"} for one in ready]
    yield from rows
    ready.clear()
    _settle(device, cell.key, failed=any(row["status"] == FAILED for row in rows))


def _settle(device: str, who: str, *, failed: bool) -> None:
    """Give memory back; raises ContextLost if the GPU is unusable."""
    if failed:
        gc.collect()  # the traceback's frames, which hold gigabytes
    if device != "cpu":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise ContextLost(f"{who}: {describe(error)}") from error


def _check(peer: Peer, inputs: Inputs, mask: Scenario, want: Expected, timer: Timer) -> _Ready:
    run = peer.prepare(inputs, mask)
    if inputs.q.is_cuda:
        # The allocator hands these out again: a result that nobody writes is NaN, not the last competitor's.
        blocks = [torch.full_like(inputs.q, float("nan")) for _ in range(8)]
        del blocks
    out, first_forward = timer.once(run.forward)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, run.leaves, run.dout, retain_graph=True)

    gradients, first_backward = timer.once(backward) if run.leaves else (None, 0.0)
    with torch.no_grad():
        public = tuple(run.public(x) for x in gradients) if gradients else None
        ratios = errors(want, run.public(out), public)  # type: ignore[arg-type]
    row: dict[str, Any] = {f"{name}_error": round(ratio, 4) for name, ratio in ratios.items()}
    wrong = [name for name, ratio in ratios.items() if not ratio <= 1]  # a NaN is not <=
    if wrong:
        row |= {"status": WRONG, "note": f"{', '.join(wrong)} beyond what rounding allows"}
    else:
        row |= {"status": OK}
    return _Ready(
        row=row,
        forward=run.forward,
        first_forward=first_forward,
        backward=backward if run.leaves else None,
        first_backward=first_backward,
    )


def _time(ready: Sequence[_Ready], timer: Timer) -> list[dict[str, Any]]:
    rows = [dict(one.row) for one in ready]
    forward = timer.in_turn([one.forward for one in ready], [one.first_forward for one in ready])
    for row, timing in zip(rows, forward, strict=True):
        row |= _columns("forward", timing) | {"timed_seconds": round(timing.ms * timing.reps / 1e3, 2)}
    trained = [(row, one.backward, one.first_backward) for row, one in zip(rows, ready, strict=True) if one.backward]
    backward = timer.in_turn([function for _, function, _ in trained], [first for *_, first in trained])
    for (row, *_), timing in zip(trained, backward, strict=True):
        row |= _columns("backward", timing)
        row["timed_seconds"] = round(row["timed_seconds"] + timing.ms * timing.reps / 1e3, 2)
    return rows


def _columns(direction: str, timing: Timing) -> dict[str, Any]:
    names = {"ms": timing.ms, "low": timing.low, "high": timing.high, "reps": timing.reps}
    return {f"{direction}_{name}": value for name, value in names.items()}


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no text'}"[:600]
