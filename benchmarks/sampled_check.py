"""Is a result right? One head at the timed shape, against float32 attention from the mask's rule in words.

Every score that a row of the head sees is visited, so the softmax of every row is known; out and dq are then compared
on sampled rows, dk and dv on sampled columns, each of which depends on every row that sees it.
benchmarks/attention_check.py compares every element, at more cost. An error may be at most twice that of the same
sampled computation with its products in the tested dtype, plus rounding: one unit of that dtype and 16 of float32, of
the largest value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Rule

SCORES = 2**28
"""Scores held at once."""


class Expected(NamedTuple):
    """What the sampled rows and columns of one batch entry and key/value head must be."""

    rows: Tensor
    columns: Tensor
    parts: dict[str, tuple[Tensor, float]]
    """`out`, `dq` (rows), `dk`, `dv` (columns) -> (exact value, largest error allowed)."""


def expected(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, visible: Rule, *, samples: int = 256) -> Expected:
    """For the last sample of the batch, the last key/value head, and (out, dq) the last query head.

    q, dout `[B, N, H, D]`, k, v `[B, N, H_kv, D]`. The last of each, since a wrong offset or an overflow shows there.
    """
    n, heads, d = q.shape[1:]
    share, scale, dtype = heads // k.shape[2], 1 / math.sqrt(d), q.dtype
    k_h, v_h = k[-1, :, -1], v[-1, :, -1]
    generator = torch.Generator().manual_seed(n)
    rows, columns = (
        torch.cat([torch.tensor([0, n - 1]), torch.randint(n, (samples,), generator=generator)]).to(q.device)
        for _ in range(2)
    )
    every = torch.arange(n, device=q.device)
    group = slice(heads - share, heads)
    q_g, dout_g = q[-1, :, group], dout[-1, :, group]
    lse, delta = _softmax_statistics(q_g, k_h, v_h, dout_g, visible, scale)
    hidden = ~visible(every[:, None], columns[None, :])
    sums: dict[str, list[Tensor]] = {"dk": [], "dv": [], "cheap dk": [], "cheap dv": []}
    for h in range(share):
        q_h, dout_h = q_g[:, h], dout_g[:, h]
        for kind, exact in (("", torch.float32), ("cheap ", dtype)):
            dk, dv = _column_gradients(q_h, k_h, v_h, dout_h, columns, hidden, lse[h], delta[h], scale, exact)
            sums[f"{kind}dk"].append(dk)
            sums[f"{kind}dv"].append(dv)
    hidden = ~visible(rows[:, None], every[None, :])
    out, dq = _row_results(q_h, k_h, v_h, dout_h, rows, hidden, scale, torch.float32)
    cheap_out, cheap_dq = _row_results(q_h, k_h, v_h, dout_h, rows, hidden, scale, dtype)
    pairs = {"out": (out, cheap_out), "dq": (dq, cheap_dq)}
    pairs |= {name: (sum(sums[name]), sum(sums[f"cheap {name}"])) for name in ("dk", "dv")}  # type: ignore[misc]
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    parts = {}
    for name, (exact_value, cheap) in pairs.items():
        budget = 2 * (cheap - exact_value).abs().max().item() + unit * exact_value.abs().max().item()
        parts[name] = (exact_value, budget)
    return Expected(rows, columns, parts)


def errors(want: Expected, out: Tensor, gradients: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, float]:
    """Part -> error over what is allowed; above 1, or NaN, is wrong. All tensors `[B, N, heads, D]`."""
    got = {"out": out[-1, want.rows, -1]}
    if gradients is not None:
        dq, dk, dv = gradients
        got |= {"dq": dq[-1, want.rows, -1], "dk": dk[-1, want.columns, -1], "dv": dv[-1, want.columns, -1]}
    ratios = {}
    for name, value in got.items():
        exact, budget = want.parts[name]
        error = (value.float() - exact).abs().max().item()
        ratios[name] = 0.0 if error == 0 else error / budget if budget else math.inf
    return ratios


def _softmax_statistics(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, visible: Rule, scale: float
) -> tuple[Tensor, Tensor]:
    """lse and delta = rowsum(out * dout) of every row, float32 `[heads, N]`; lse of a row that sees nothing is 0.

    q, dout `[N, heads, D]`, k, v `[N, D]`. A strip of rows meets the columns that one of them sees, and no others.
    """
    n, heads = q.shape[:2]
    lse, delta = (torch.zeros((heads, n), device=q.device) for _ in range(2))
    columns = torch.arange(n, device=q.device)[None, :]
    strip = max(1, SCORES // n)
    for first in range(0, n, strip):
        rows = slice(first, min(first + strip, n))
        seen = visible(torch.arange(rows.start, rows.stop, device=q.device)[:, None], columns)
        some = seen.any(0).nonzero()[:, 0]
        if len(some) == 0:
            continue
        hidden, k_s, v_s = ~seen[:, some], k[some].float(), v[some].float()
        for h in range(heads):
            s = (q[rows, h].float() @ k_s.T).mul_(scale).masked_fill_(hidden, float("-inf"))
            lse_r = s.logsumexp(1)
            lse[h, rows] = lse_r.masked_fill(lse_r == float("-inf"), 0)
            p = s.sub_(lse[h, rows, None]).exp_()
            delta[h, rows] = ((p @ v_s) * dout[rows, h].float()).sum(1)
    return lse, delta


def _row_results(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor, hidden: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out and dq of the rows, `[rows, D]` float32; products take `dtype`."""
    s = _product(q[rows], k.T, dtype).mul_(scale).masked_fill_(hidden, float("-inf"))
    lse = s.logsumexp(1)
    p = s.sub_(lse.masked_fill(lse == float("-inf"), 0)[:, None]).exp_()
    out = _product(p, v, dtype)
    delta = (out * dout[rows].float()).sum(1)
    ds = _product(dout[rows], v.T, dtype).sub_(delta[:, None]).mul_(p).mul_(scale)
    return out, _product(ds, k, dtype)


def _column_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    columns: Tensor,
    hidden: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """This head's share of dk and dv of the columns, `[columns, D]` float32; products take `dtype`."""
    s = _product(q, k[columns].T, dtype).mul_(scale).sub_(lse[:, None])
    p = s.exp_().masked_fill_(hidden, 0)
    ds = _product(dout, v[columns].T, dtype).sub_(delta[:, None]).mul_(p).mul_(scale)
    return _product(ds.T, q, dtype), _product(p.T, dout, dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) @ b.to(dtype)).float()
