"""The exchange of one stage: keys and values on their way in, their gradients on their way back.

One uneven all-to-all each, over whatever the stage's counts say: a plan in which everybody needs everything is an
all-gather, one with a stage for each neighbour is a ring, and the code is the same. NCCL and gloo.

Every rank starts every exchange of every stage, in the same order, even where it has nothing to send or to receive:
a collective that one rank leaves out is a hang of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fm_longctx.context_parallel.stages import Stage
from fm_longctx.context_parallel.waits import waiting
from fm_longctx.kernels.merge import add_rows


class Pending:
    """An all-to-all under way. What it sends and receives is held until `wait`.

    gloo moves CPU memory only: tensors on a GPU go through pinned host buffers. That lets several ranks share one GPU,
    which NCCL does not, and blocks the host; it is for tests, not for speed.
    """

    def __init__(
        self, sent: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        self.device = sent.device
        self.staged = needs_host(sent.device, group)
        if self.staged:
            sent = _to_host(sent)
        self.sent: Tensor | None = sent
        self.received = _empty_like(sent, sum(receive_counts), pin=self.staged)
        self.work = dist.all_to_all_single(
            self.received, sent, list(receive_counts), list(send_counts), group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """`[sum of receive_counts, ...]`, by source rank. On a GPU the current stream waits, not the host.

        Raises:
            RuntimeError: a rank is gone, or did not come within the group's timeout. With NCCL it is the watchdog that
                ends the process.
        """
        with waiting(self.device):
            self.work.wait()
        self.sent = None
        return self.received.to(self.device, non_blocking=True) if self.staged else self.received


def needs_host(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether the group's backend for this device is gloo, and the device is not a CPU."""
    if device.type == "cpu":
        return False
    return backends_of(group).get(device.type) == "gloo"


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """Which backend a group has for each type of device."""
    return dict(part.split(":") for part in dist.get_backend_config(group).split(","))


def _to_host(x: Tensor) -> Tensor:
    host = _empty_like(x, len(x), pin=True)
    host.copy_(x)
    return host


def _empty_like(x: Tensor, length: int, *, pin: bool) -> Tensor:
    if pin:
        return torch.empty((length, *x.shape[1:]), dtype=x.dtype, pin_memory=torch.cuda.is_available())
    return x.new_empty((length, *x.shape[1:]))


def start_keys(stage: Stage, own: Tensor, group: dist.ProcessGroup) -> Pending:
    """Send the rank's own keys and values, packed, to where the stage needs them."""
    return Pending(own.index_select(0, stage.send_rows), stage.send_counts, stage.receive_counts, group)


def start_gradients(stage: Stage, dk: Tensor, dv: Tensor, group: dist.ProcessGroup) -> Pending:
    """Send the gradients of a stage's columns `[B, n, H_kv, D]` and `[B, n, H_kv, D_v]` back to their owners."""
    return Pending(pack(dk, dv), stage.receive_counts, stage.send_counts, group)


def add_gradients_(total: Tensor, stage: Stage, returned: Tensor) -> None:
    """Add what `start_gradients` brought, packed, to the packed gradients of the rank's own keys, in place.

    Several ranks return gradients of the same key: they are added in rank order, so the sum is repeatable bit for bit.
    On a GPU by one kernel, elsewhere by one addition per rank, within which the rows are distinct.
    """
    if total.is_cuda and total.dtype == torch.float32:
        add_rows(total, returned, stage.return_rows, stage.return_order)
        return
    for rows, part in zip(stage.send_rows.split(stage.send_counts), returned.split(stage.send_counts), strict=True):
        if len(rows):
            total.index_add_(0, rows, part)


def pack(k: Tensor, v: Tensor) -> Tensor:
    """k `[B, n, H_kv, D]` and v `[B, n, H_kv, D_v]` as one contiguous `[n, B, H_kv, D + D_v]`."""
    return torch.cat([k, v], dim=-1).transpose(0, 1).contiguous()


def unpack(packed: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`, as views; d is k's last dimension."""
    k, v = packed.transpose(0, 1).tensor_split([d], dim=-1)
    return k, v
