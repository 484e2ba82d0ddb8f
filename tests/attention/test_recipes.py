"""The recipes of docs/attention.md that stand on the differentiable LSE, against a dense float64 softmax."""

import math

import pytest
import torch

from fm_longctx import FlashMask, flashmask_attention
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, random_inputs


def attend_with_sinks(q, k, v, sink, mask, backend):
    """The recipe, as the page has it. sink `[H]`."""
    out, lse = flashmask_attention(q, k, v, mask, return_lse=True, backend=backend)
    share = torch.sigmoid(lse.transpose(1, 2) - sink)  # [B, N_q, H]: what the sink leaves to the visible columns
    return out * share[..., None].to(out.dtype)


def dense_with_sinks(q, k, v, sink, visible):
    """Softmax over the visible scores and one extra logit a head, which has no value: the definition."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    visible = visible.repeat_interleave(q.shape[2] // visible.shape[1], dim=1)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~visible, float("-inf"))
    extra = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    p = torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhmn,bnhd->bmhd", p, v)


def gradients(attend, inputs, dout):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("by_head", [False, True])
def test_attention_sinks(by_head, dtype, backend):
    n, heads, kv_heads = 70, 4, 2
    document = torch.tensor([0] * 30 + [1] * 40)
    index = torch.arange(n)
    visible = ((index[:, None] >= index) & (document[:, None] == document))[None, None]
    mask = builders.causal_document([30, 40])
    if by_head:
        visible = visible.repeat(1, heads, 1, 1)
        visible[:, 1, 10:20] = False  # rows that see the sink alone
        visible[:, 2, :, :8] = False
        mask = FlashMask.from_dense(visible)
    visible, mask = visible.to(DEVICE), mask.to(DEVICE)
    q, k, v = random_inputs(batch=2, rows=n, heads=heads, kv_heads=kv_heads, dtype=dtype)
    # From a sink that takes nothing to one that takes nearly everything.
    sink = torch.tensor([-20.0, 0.0, 1.5, 8.0], device=DEVICE)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(q)

    def dense(*inputs):
        return dense_with_sinks(*inputs, visible)

    exact = gradients(dense, [x.double() for x in (q, k, v, sink)], dout)
    low = gradients(lambda q, k, v, sink: dense(q, k, v, sink.to(dtype)), [q, k, v, sink], dout)
    got = gradients(lambda *inputs: attend_with_sinks(*inputs, mask, backend), [q, k, v, sink], dout)
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    for name, have, want, cheap in zip(("out", "dq", "dk", "dv", "dsink"), got, exact, low, strict=True):
        budget = 2 * (cheap - want).abs().max() + unit * want.abs().max()
        assert (have - want).abs().max() <= budget, name
    if by_head:
        assert got[0][:, 10:20, 1].eq(0).all()
