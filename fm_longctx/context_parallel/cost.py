"""What a layout costs in time: the model that the planner weighs balance and traffic with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fm_longctx.context_parallel.coverage import Floats

# Bytes that a stage more moves for each element, in float32: of all rows the part that is written; of those that are
# merged two that are read and one that is written. Parts of dQ are added for all rows.
_PART, _MERGE = 4.0, 12.0
# Of the seven products of a tile that the backward computes, those for dK and dV and what they are made of; the others
# are dQ's kernel's.
_KEY_SHARE = 4 / 7
# Columns of a block of the dK and dV kernel.
_COLUMNS = 128


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """A kernel rate, a link and a layer's shape. The defaults are assumptions, not measurements of your machine.

    They describe one attention layer of a 70B Llama in bfloat16 on hosts of 8 H100s: NVLink within a host, one 400 Gb/s
    network card a GPU between hosts. Links within and between hosts work at the same time. Rank r of a sequence is on
    host r // `host_ranks`. The plan needs the *ratio* of compute to transfer to be of the right order, no more.

    Raises:
        ValueError: a number that is not positive and finite (`latency` may be 0), or heads that do not divide.
    """

    heads: int = 64
    """H, query heads."""
    kv_heads: int = 8
    """H_kv, key and value heads."""
    head_dim: int = 128
    """D, of queries, keys and values."""
    element_bytes: int = 2
    """Bytes of one element of K and V as they travel forward."""
    gradient_bytes: int = 4
    """Bytes of one element of dK and dV as they travel back: float32."""
    forward_flops: float = 6.5e14
    """FLOP/s of the forward kernel on the tiles that it visits."""
    backward_flops: float = 4.8e14
    """FLOP/s of the backward kernel on the tiles that it visits."""
    processors: int = 132
    """Streaming multiprocessors: how many blocks of a kernel run at the same time."""
    bandwidth: float = 4.5e10
    """Bytes a second that a rank can send to other hosts and, at the same time, receive from them."""
    host_bandwidth: float = 3e11
    """Bytes a second that a rank can send within its host and, at the same time, receive: two thirds of an H100's
    NVLink in one direction."""
    host_ranks: int = 8
    """Ranks of a sequence that share a host; 1 where every link is like those between hosts. With 4 tensor ranks inside
    each rank of the sequence, 8 GPUs are 2."""
    latency: float = 3e-5
    """Seconds that an exchange takes beyond its bytes: launch, handshake and the slowest of the ranks."""
    memory_bandwidth: float = 2.5e12
    """Bytes a second that merging partial outputs, and packing what travels, reads and writes."""
    hidden_price: float = 0.25
    """What a second of exchange costs while it hides behind attention, in seconds: it slows the kernels down and meets
    the traffic of others on the network. 0 would make hidden traffic free, 1 as dear as waiting for it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least_is_zero = field.name in ("latency", "hidden_price")
            if not (math.isfinite(value) and (value > 0 or (least_is_zero and value == 0))):
                allowed = "0 or positive" if least_is_zero else "positive"
                raise ValueError(f"CostModel.{field.name} must be {allowed} and finite, got {value!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"CostModel.kv_heads must divide heads, got {self.kv_heads} and {self.heads}.")

    @property
    def forward_key_bytes(self) -> int:
        """Bytes of one position's K and V."""
        return 2 * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def backward_key_bytes(self) -> int:
        """Bytes of one position's dK and dV."""
        return 2 * self.kv_heads * self.head_dim * self.gradient_bytes

    def forward_compute(self, scores: Floats) -> Floats:
        """Seconds for so many scores of one query head, computed for all heads: 4 D FLOPs a score and head."""
        return 4.0 * self.head_dim * self.heads * scores / self.forward_flops

    def backward_compute(self, scores: Floats) -> Floats:
        """Seconds for the gradients of so many scores: 2.5 times the forward's FLOPs."""
        return 10.0 * self.head_dim * self.heads * scores / self.backward_flops

    def backward_stage(self, scores: Floats, longest: Floats) -> Floats:
        """Seconds for the gradients of a stage: not less than the block of keys takes that most rows see.

        One processor goes through all of these rows, for all query heads of a key/value head, one after the other: with
        head parallelism a rank has rows of many ranks and few key/value heads, and may wait for it.

        Args:
            longest: rows that the key sees that most rows see.
        """
        seconds = self.backward_compute(scores)
        of_block = longest * _COLUMNS * (self.heads // self.kv_heads)
        list_seconds = _KEY_SHARE * 10.0 * self.head_dim * of_block * self.processors / self.backward_flops
        return np.where(scores > 0, np.maximum(seconds, (1 - _KEY_SHARE) * seconds + list_seconds), 0.0)

    def merge(self, rows: Floats, merged: Floats) -> Floats:
        """Seconds to merge a stage's output (or part of dQ) into the rank's.

        Args:
            rows: the rank's.
            merged: of these, the ones that the stage's keys show something to; for dQ all.
        """
        return (_PART * rows + _MERGE * merged) * self.heads * self.head_dim / self.memory_bandwidth

    def transfer(self, far: Floats, near: Floats | float = 0.0) -> Floats:
        """Seconds for exchanges in which a rank sends or receives at most so many bytes; 0 for none.

        Args:
            far, near: to or from other hosts, and within the rank's.
        """
        seconds = np.maximum(far / self.bandwidth, np.asarray(near) / self.host_bandwidth)
        return np.where(seconds > 0, self.latency + seconds, 0.0)

    def rings_a_host(self, members: int) -> int:
        """Rings of so many members that lie on one host, 1 where a ring is not within one."""
        return self.host_ranks // members if self.host_ranks % members == 0 else 1

    def trade_heads(self, rows: Floats, members: int) -> Floats:
        """Seconds in which the members of a ring trade rows for heads of Q, K and V, and heads for rows of the output.

        Args:
            rows: positions of one member.
            members: 1 trades nothing.
        """
        there, back = self._traded(members)
        packing = 2.0 * rows * (there + back) / self.memory_bandwidth
        return self.trade_link(rows, members) + (packing if members > 1 else 0.0)

    def trade_link(self, rows: Floats, members: int) -> Floats:
        """The part of `trade_heads` that the link takes, without packing. A ring that is not within a host sends what
        it can within it."""
        beside = math.gcd(members, self.host_ranks)
        far, near = (members - beside) / members, (beside - 1) / members
        there, back = (self.transfer(rows * b * far, rows * b * near) for b in self._traded(members))
        return there + back

    def _traded(self, members: int) -> tuple[float, float]:
        """Bytes of one position's Q, K and V as they are split, and of its output."""
        element = float(self.head_dim * self.element_bytes)
        return (self.heads + 2 * max(self.kv_heads, members)) * element, self.heads * element


class Prediction(NamedTuple):
    """Seconds of each rank, float64 `[ranks]`, for one attention layer."""

    compute: Floats
    """Attention and merging alone."""
    total: Floats
    """With what the rank waits for keys or gradients."""

    @property
    def exposed(self) -> Floats:
        """What the rank waits."""
        return self.total - self.compute


class Work(NamedTuple):
    """What each rank does in each stage, float64 `[ranks, stages]`, and its rows."""

    scores: Floats
    """Computed, for all mask heads' share of one query head."""
    far: Floats
    """Keys that a rank sends to other hosts or receives from them, whichever are more, before each stage."""
    near: Floats
    """The same within its host."""
    rows: Floats
    """`[ranks]`: rows of each rank."""
    merged: Floats
    """`[ranks]`: of these, the ones that see keys of others: the others are not merged."""
    longest: Floats
    """Rows that see the key that most rows see."""

    @property
    def merges(self) -> npt.NDArray[np.bool_]:
        """`[ranks, stages]`: a part is computed that others were computed before."""
        return (self.scores > 0) & (self.scores.cumsum(1) > self.scores)


def predict_forward(cost: CostModel, work: Work) -> Prediction:
    """The forward: later stages travel while stage s is attended to.

    >>> shape = dict(heads=1, kv_heads=1, head_dim=1, element_bytes=1, forward_flops=4, bandwidth=2, latency=0)
    >>> model = CostModel(**shape, memory_bandwidth=1e30)
    >>> far = np.array([[0.0, 1.5, 2.0]])
    >>> work = Work(np.array([[2.0, 1.0, 1.0]]), far, 0 * far, np.ones(1), np.ones(1), 0 * far)
    >>> predict_forward(model, work).total.round(6).tolist()
    [4.5]
    """
    compute = cost.forward_compute(work.scores) + cost.merge(work.rows, work.merged)[:, None] * work.merges
    return forward_timeline(compute, cost.transfer(*(keys * cost.forward_key_bytes for keys in (work.far, work.near))))


def predict_backward(cost: CostModel, work: Work) -> Prediction:
    """The backward: gradients of a stage travel while the stages before it are computed; the rank's own keys come
    last, unless they are attended to with others'."""
    # Each stage's part of dQ is added to the others'.
    merging = cost.merge(work.rows, work.rows)[:, None] * work.merges
    compute = cost.backward_stage(work.scores, work.longest) + merging
    return backward_timeline(
        compute, cost.transfer(*(keys * cost.backward_key_bytes for keys in (work.far, work.near)))
    )


def forward_timeline(compute: Floats, transfers: Floats) -> Prediction:
    """When each rank is done, from the seconds of each stage's attention and of the exchange before it, `[ranks,
    stages]` each. The exchanges follow one another from the start on."""
    arrived = transfers.cumsum(1)
    done = np.zeros(len(compute))
    for s in range(compute.shape[1]):
        done = np.maximum(arrived[:, s], done) + compute[:, s]
    return Prediction(compute.sum(1), done)


def backward_timeline(compute: Floats, transfers: Floats) -> Prediction:
    """As `forward_timeline`, of the backward: from the last stage to the first, each exchange after its stage."""
    arrived = done = np.zeros(len(compute))
    for s in range(compute.shape[1] - 1, 0, -1):
        done = done + compute[:, s]
        arrived = np.maximum(arrived, done) + transfers[:, s]
    return Prediction(compute.sum(1), np.maximum(arrived, done + compute[:, 0]))
