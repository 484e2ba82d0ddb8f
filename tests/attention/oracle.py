"""Dense attention, written from its definition: the float64 oracle and the budget that low precision is allowed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fm_longctx import FlashMask
from fm_longctx.attention import reference
from fm_longctx.kernels.schedule import TileRuns
from fm_longctx.mask.tiles import PARTIAL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """out, lse in the inputs' dtype. visible bool `[B or 1, 1 or H_kv or H, N_q, N_k]`."""
    share = q.shape[2] // k.shape[2]
    visible = visible.repeat_interleave(q.shape[2] // visible.shape[1], dim=1)
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # Rows that see nothing: exp(-inf - 0) = 0 in place of NaN.
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return torch.einsum("bhmn,bnhd->bmhd", p, v), lse


def assert_right(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: FlashMask) -> None:
    """A forward in 16 bits, whose scores may be hundreds apart, beside float64."""
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), mask.to_dense(), 1 / math.sqrt(q.shape[3]))
    assert (out - exact).abs().max() <= 0.05
    seen = exact_lse > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    assert ((lse - exact_lse).abs() / (1 + exact_lse.abs()))[seen].max() <= 1e-5


def gradients(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None) -> Result:
    """Run `attend(q, k, v) -> (out, lse)` and its backward for these output gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == float("-inf"), 0) * dlse.to(lse.dtype)).sum()
    loss.backward()
    return Result(out.detach(), lse.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)))


def assert_within_budget(result: Result, exact: Result, low: Result, *, magnitude: float = 0.0) -> None:
    """max|result - exact| <= 2 max|low - exact| + rounding, for every part. NaN fails.

    The rounding term is one unit of the output's dtype and 16 of the float32 in which every backend accumulates, of the
    largest value; of dq and dk at least of `magnitude`: where a row sees one column alone, they are what large terms
    leave.
    """
    for name, got, want, cheap in zip(Result._fields, result, exact, low, strict=True):
        assert got.shape == want.shape, f"{name}: {list(got.shape)} instead of {list(want.shape)}"
        unseen = want == float("-inf")
        assert torch.equal(got == float("-inf"), unseen), f"{name}: rows without a column differ"
        if want.numel() == 0:
            continue
        got, want, cheap = (x.double().masked_fill(unseen, 0) for x in (got, want, cheap))
        unit = torch.finfo(result.out.dtype).eps + 16 * torch.finfo(torch.float32).eps
        largest = max(float(want.abs().max()), magnitude if name in ("dq", "dk") else 0.0)
        budget = 2 * (cheap - want).abs().max() + unit * largest
        worst = (got - want).abs().max()
        assert worst <= budget, f"{name}: error {worst:.3e} beyond {budget:.3e}"


def check(
    attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    with_lse: bool = True,
    with_out: bool = True,
    magnitude: float = 0.0,
) -> Result:
    """Compare `attend(q, k, v) -> (out, lse)`, forward and backward, with the float64 oracle.

    The loss is a random sum of out, of lse, or of both.
    """
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(*q.shape[:3], v.shape[-1], generator=generator).to(q) * with_out
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=generator).to(q) if with_lse else None

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, visible, scale, softcap)

    exact = gradients(dense, q.double(), k.double(), v.double(), dout, dlse)
    low = gradients(dense, q, k, v, dout, dlse)
    result = gradients(attend, q, k, v, dout, dlse)
    assert_within_budget(result, exact, low, magnitude=magnitude)
    return result


def visit_every_tile(mask: FlashMask) -> None:
    """Make the schedules that the mask has cached visit all tiles, each as a partial one."""
    for key, schedule in list(mask.cache.items()):
        if key[0] is reference.Schedule:
            assert not schedule.states.eq(PARTIAL).all()
            mask.cache[key] = reference.Schedule(torch.full_like(schedule.states, PARTIAL))
        elif key[0] is TileRuns:
            _, block_m, block_n, by_row = key
            others = -(-mask.num_columns // block_n) if by_row else -(-mask.num_rows // block_m)
            assert schedule.tiles.sum() < schedule.tiles.numel() * others
            first = torch.arange(schedule.first.numel(), dtype=torch.int32, device=mask.device)
            runs = torch.tensor([1, others], dtype=torch.int32, device=mask.device).repeat(first.numel() + 1, 1)
            mask.cache[key] = schedule._replace(
                runs=runs,
                first=first.view_as(schedule.first),
                run_count=torch.ones_like(schedule.run_count),
                tiles=torch.full_like(schedule.tiles, others),
            )


def random_inputs(
    *,
    batch: int = 1,
    rows: int,
    columns: int | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 32,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = rows if columns is None else columns
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = [(batch, rows, heads, d), (batch, columns, kv_heads, d), (batch, columns, kv_heads, d_v or d)]
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return q, k, v
