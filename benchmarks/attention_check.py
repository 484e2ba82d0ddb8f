"""Is the op right at real shapes? Every mask case against a chunked float32 oracle, forward and backward, on a GPU.

    python -m benchmarks.attention_check --out benchmarks/results

The oracle knows the masks by their rules in words (benchmarks/cases.py), never by intervals, and visits every score.
An error may be at most twice that of the same dense computation with its products in the tested dtype, plus rounding:
one unit of that dtype and 16 of float32, of the largest value. Outputs are NaN before the kernels run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import Case, Rule, cases
from benchmarks.environment import environment
from fm_longctx import flashmask_attention

PARTS = ("out", "lse", "dq", "dk", "dv")
CHUNK = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, nargs=2, default=[2, 1], help="query heads, key/value heads")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--cases", nargs="+", help="names of cases; all if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="folder for a dated .jsonl; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    options = parser.parse_args()

    rows = []
    for n in options.lengths:
        for case in cases(n):
            if options.cases and case.name not in options.cases:
                continue
            for d in options.head_dims:
                row = compare(case, n, d, options)
                rows.append(row)
                worst = max(row[f"{part}_error"] / row[f"{part}_budget"] for part in PARTS)
                print(
                    f"{'ok  ' if row['ok'] else 'FAIL'} {case.name:24} N {n:7} D {d:4} "
                    f"worst error / budget {worst:.2f} ({row['seconds']:.1f} s)",
                    flush=True,
                )
    failed = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} within budget")
    if options.out:
        about = environment(options.commit)
        path = options.out / f"{about['date']}-attention_check-{options.backend}-{options.dtype}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in [about, *rows]))
    raise SystemExit(1 if failed else 0)


def compare(case: Case, n: int, d: int, options: argparse.Namespace) -> dict[str, object]:
    begin = time.monotonic()
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(options.device).manual_seed(n + d)
    heads, kv_heads = options.heads
    q, k, v, dout = (
        torch.randn((1, n, h, d), generator=generator, device=options.device).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    mask = case.mask.to(options.device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with poisoned():
        out, lse = flashmask_attention(*leaves, mask, return_lse=True, backend=options.backend)
        out.backward(dout)
    got = (out.detach(), lse.detach(), *(x.grad for x in leaves))
    exact = dense(q, k, v, dout, case.visible, torch.float32)
    cheap = dense(q, k, v, dout, case.visible, dtype)

    row: dict[str, object] = {"case": case.name, "n": n, "d": d, "dtype": options.dtype, "backend": options.backend}
    row |= {"heads": heads, "kv_heads": kv_heads, "ok": True}
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    for part, a, b, c in zip(PARTS, got, exact, cheap, strict=True):
        unseen = b == float("-inf")
        a, b, c = (x.float().masked_fill(unseen, 0) for x in (a, b, c))
        error = (a - b).abs().max().item()
        budget = 2 * (c - b).abs().max().item() + unit * b.abs().max().item()
        row[f"{part}_error"], row[f"{part}_budget"] = error, budget
        row["ok"] = bool(row["ok"]) and error <= budget  # a NaN is not <=
    row["seconds"] = round(time.monotonic() - begin, 2)
    return row


def dense(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, visible: Rule, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, dq, dk, dv by all N x N scores, CHUNK rows at a time; products take `dtype` and sum in float32."""
    n, heads, d = q.shape[1:]
    share, scale = heads // k.shape[2], 1 / math.sqrt(d)
    out, dq, dk, dv = (torch.zeros(x.shape, device=x.device) for x in (q, q, k, v))
    lse = torch.empty((1, heads, n), device=q.device)
    columns = torch.arange(n, device=q.device)[None, :]

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).float()

    for first in range(0, n, CHUNK):
        rows = slice(first, first + CHUNK)
        hidden = ~visible(torch.arange(n, device=q.device)[rows, None], columns)
        for h in range(heads):
            k_h, v_h = k[0, :, h // share], v[0, :, h // share]
            s = product(q[0, rows, h], k_h.T).mul_(scale).masked_fill_(hidden, float("-inf"))
            lse_r = torch.logsumexp(s, dim=1)
            p = s.sub_(lse_r.masked_fill(lse_r == float("-inf"), 0)[:, None]).exp_()
            out[0, rows, h] = product(p, v_h)
            lse[0, h, rows] = lse_r
            dv[0, :, h // share] += product(p.T, dout[0, rows, h])
            delta = (out[0, rows, h] * dout[0, rows, h].float()).sum(1)
            ds = product(dout[0, rows, h], v_h.T).sub_(delta[:, None]).mul_(p).mul_(scale)
            dq[0, rows, h] = product(ds, k_h)
            dk[0, :, h // share] += product(ds.T, q[0, rows, h])
    return out, lse, dq, dk, dv


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an output element nobody writes is seen."""
    empty = torch.empty

    def nan(*args: object, **kwargs: object) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    with patch.object(torch, "empty", nan):
        yield


if __name__ == "__main__":
    main()
