"""What a layout costs in time: the model that the planner weighs balance and traffic with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from fm_longctx.context_parallel.coverage import Floats


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """A kernel rate, a link and a layer's shape. The defaults are assumptions, not measurements of your machine.

    They describe one attention layer of a 70B Llama in bfloat16 on an H100 behind one 400 Gb/s network card a GPU.
    Set `bandwidth` to 3e11 or so where all ranks of a sequence share an NVLink domain. The plan needs the *ratio* of
    compute to transfer to be of the right order, no more.

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
    forward_flops: float = 5.5e14
    """FLOP/s of the forward kernel on the tiles that it visits."""
    backward_flops: float = 4.5e14
    """FLOP/s of the backward kernel on the tiles that it visits."""
    bandwidth: float = 4.5e10
    """Bytes a second that a rank can send and, at the same time, receive."""
    latency: float = 3e-5
    """Seconds that an exchange takes beyond its bytes: launch, handshake and the slowest of the ranks."""
    memory_bandwidth: float = 2.5e12
    """Bytes a second that merging partial outputs reads and writes."""
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

    def merge(self, rows: Floats) -> Floats:
        """Seconds to merge a stage's output (or part of dQ) into the rank's: both read and one written in float32, and
        the part before that written."""
        return 16.0 * rows * self.heads * self.head_dim / self.memory_bandwidth

    def transfer(self, num_bytes: Floats) -> Floats:
        """Seconds for exchanges in which a rank sends or receives at most so many bytes; 0 for none."""
        return np.where(num_bytes > 0, self.latency + num_bytes / self.bandwidth, 0.0)

    def trade_heads(self, rows: Floats, members: int) -> Floats:
        """Seconds in which the members of a ring trade rows for heads of Q, K and V, and heads for rows of the output.

        Args:
            rows: positions of one member.
            members: 1 trades nothing.
        """
        if members == 1:
            return 0.0 * rows
        there = (self.heads + 2 * max(self.kv_heads, members)) * self.head_dim * self.element_bytes
        back = self.heads * self.head_dim * self.element_bytes
        away = (members - 1) / members
        return self.transfer(rows * there * away) + self.transfer(rows * back * away)


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


def predict_forward(cost: CostModel, scores: Floats, keys: Floats, rows: Floats) -> Prediction:
    """The forward: later stages travel while stage s is attended to.

    Args:
        scores: what each rank computes in each stage, `[ranks, stages]`, for all mask heads' share of one query head.
        keys: keys that a rank sends or receives, whichever are more, before each stage, `[ranks, stages]`; 0 in the
            first.
        rows: of each rank, those that see keys of others, `[ranks]`: the others are not merged.

    >>> shape = dict(heads=1, kv_heads=1, head_dim=1, element_bytes=1, forward_flops=4, bandwidth=2, latency=0)
    >>> model = CostModel(**shape, memory_bandwidth=1e30)
    >>> scores, keys = np.array([[2.0, 1.0, 1.0]]), np.array([[0.0, 1.5, 2.0]])
    >>> predict_forward(model, scores, keys, np.ones(1)).total.round(6).tolist()
    [4.5]
    """
    compute = cost.forward_compute(scores)
    compute[:, 1:] += cost.merge(rows)[:, None] * (scores[:, 1:] > 0)
    return forward_timeline(compute, cost.transfer(keys * cost.forward_key_bytes))


def predict_backward(cost: CostModel, scores: Floats, keys: Floats, rows: Floats) -> Prediction:
    """The backward: gradients of a stage travel while the stages before it are computed; the rank's own keys come last.

    Arguments as in `predict_forward`.
    """
    compute = cost.backward_compute(scores)
    # Each stage's part of dQ is added to the others'.
    compute[:, 1:] += cost.merge(rows)[:, None] * (scores[:, 1:] > 0)
    return backward_timeline(compute, cost.transfer(keys * cost.backward_key_bytes))


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
