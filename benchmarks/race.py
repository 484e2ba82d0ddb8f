"""One cell: each competitor is checked, then timed, in this process, with the same timer, inputs and mask."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.cells import Cell, Scenario, scenario
from benchmarks.peers import Inputs, Peer, make_inputs
from benchmarks.sampled_check import Expected, errors, expected
from benchmarks.timing import Timer

OK, WRONG, FAILED, REFUSED = "ok", "wrong", "failed", "refused"


class ContextLost(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


def race(cell: Cell, peers: Sequence[Peer], device: str, timer: Timer) -> Iterator[dict[str, Any]]:
    """One row a competitor: `status`, and times in ms if it is `ok`. One that fails is a row with the error's text.

    The forward is timed as in training, with what the backward needs kept; the backward by `torch.autograd.grad` for a
    fixed dout. `timed_seconds` is what the repetitions took, of the row's time.

    Raises:
        ContextLost: after the row of a competitor that left the GPU unusable.
    """
    mask = scenario(cell.case, cell.n, cell.seed)
    area = int(mask.case.mask.area().sum())
    common: tuple[Inputs, Expected] | None = None
    for peer in peers:
        row: dict[str, Any] = {"competitor": peer.name, "area": area}
        try:
            reason = peer.refusal(cell, mask, device)
            if reason is not None:
                row |= {"status": REFUSED, "note": reason}
            else:
                if common is None:
                    inputs = make_inputs(cell, device)
                    common = inputs, expected(*inputs, mask.case.visible)
                row |= _measure(peer, common[0], mask, common[1], timer)
        except Exception as error:  # whatever a competitor raises is its result
            row |= {"status": FAILED, "note": describe(error)}
        yield row
        if row["status"] == FAILED:
            gc.collect()  # the traceback's frames, which hold gigabytes
        if device != "cpu":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise ContextLost(f"{peer.name} on {cell.key}: {describe(error)}") from error


def _measure(peer: Peer, inputs: Inputs, mask: Scenario, want: Expected, timer: Timer) -> dict[str, Any]:
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
    del gradients, public
    worst = {f"{name}_error": round(ratio, 4) for name, ratio in ratios.items()}
    wrong = [name for name, ratio in ratios.items() if not ratio <= 1]  # a NaN is not <=
    if wrong:
        return worst | {"status": WRONG, "note": f"{', '.join(wrong)} beyond what rounding allows"}
    begin = time.monotonic()
    forward = timer.finish(run.forward, first_forward)
    row = worst | {"status": OK, "forward_ms": forward.ms, "forward_low": forward.low, "forward_high": forward.high}
    row |= {"forward_reps": forward.reps}
    if run.leaves:
        timing = timer.finish(backward, first_backward)
        row |= {"backward_ms": timing.ms, "backward_low": timing.low, "backward_high": timing.high}
        row |= {"backward_reps": timing.reps}
    return row | {"timed_seconds": round(time.monotonic() - begin, 2)}


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no text'}"[:600]
