"""Merging partial attention: many parts against float64 over all keys, and rows that see nothing."""

import pytest
import torch

from fm_longctx import ShardPlan
from fm_longctx.context_parallel.exchange import add_gradients_
from fm_longctx.context_parallel.merge import merge_
from fm_longctx.kernels.merge import add_rows, merge
from fm_longctx.mask import builders

# Interpreted on a CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_kernel(out, lse, part, part_lse, result=None):
    merge(out, lse, part, part_lse, out if result is None else result)


MERGES = {"torch": merge_, "triton": by_kernel}


def part_of(scores, values):
    """out `[1, N, H, D]` and lse `[1, H, N]` of scores `[1, H, N, M]` over values `[1, M, H, D]`, -inf safe."""
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return torch.einsum("bhnm,bmhd->bnhd", weights, values), lse


@pytest.mark.parametrize("how, parts", [("torch", 1), ("torch", 2), ("torch", 64), ("triton", 2), ("triton", 64)])
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_many_parts_equal_the_whole(parts, spread, how):
    generator = torch.Generator().manual_seed(parts)
    heads, rows, d = 2, 33, 8
    scores = spread * torch.randn(1, heads, rows, parts * 5, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.5, -torch.inf)
    scores[:, :, 3] = -torch.inf
    scores[:, :, 4, 1:] = -torch.inf
    scores[:, :, 4, 0] = -3.0
    scores[:, :, 5, :-1] = -torch.inf
    values = torch.randn(1, parts * 5, heads, d, generator=generator, dtype=torch.float64)
    expected, expected_lse = part_of(scores, values)

    # Inputs that float32 holds exactly: what differs afterwards is the merge's own rounding.
    pieces = [
        [x.float().to(DEVICE) for x in part_of(s, v)]
        for s, v in zip(scores.split(5, dim=-1), values.split(5, dim=1), strict=True)
    ]
    out, lse = pieces[0]
    for piece in pieces[1:]:
        MERGES[how](out, lse, *piece)
    out, lse = out.cpu(), lse.cpu()
    unseen = expected_lse == -torch.inf
    assert lse.isneginf().equal(unseen) and unseen[:, :, 3].all()
    assert (out[:, 3] == 0).all()
    eps = torch.finfo(torch.float32).eps
    # Each part's lse and average were rounded once; an error e in the difference of two lse is a factor 1 + e.
    largest = expected_lse.masked_fill(unseen, 0).abs().max()
    assert (lse - expected_lse).masked_fill(unseen, 0).abs().max() <= 4 * eps * largest
    assert (out - expected).abs().max() <= 8 * eps * (1 + largest) * expected.abs().max()


@pytest.mark.parametrize("how", MERGES)
def test_the_order_of_empty_parts_does_not_matter(how):
    merge_ = MERGES[how]
    out, lse = torch.full((1, 1, 1, 2), 3.0, device=DEVICE), torch.full((1, 1, 1), 1.5, device=DEVICE)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for first, second in (((out, lse), (nothing, never)), ((nothing, never), (out, lse))):
        merged, total = first[0].clone(), first[1].clone()
        merge_(merged, total, *second)
        assert merged.equal(out) and total.equal(lse)
    merged, total = nothing.clone(), never.clone()
    merge_(merged, total, nothing, never)
    assert merged.equal(nothing) and total.equal(never)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", MERGES)
def test_the_last_merge_writes_another_tensor_and_rounds_once(how, dtype):
    """Strides of every kind, a head dimension that is no power of two, and out itself left alone."""
    generator = torch.Generator().manual_seed(5)
    b, n, h, d = 2, 19, 3, 24

    def averages(strided):
        x = torch.randn(b, h, n, d, generator=generator).transpose(1, 2)
        return (x if strided else x.contiguous()).to(DEVICE)

    out, part = averages(strided=True), averages(strided=False)
    lse, part_lse = (torch.randn(b, h, n, generator=generator).to(DEVICE) for _ in range(2))
    part_lse[0, 1, 4:9] = lse[1, :, 7] = -torch.inf
    part_lse = part_lse.transpose(1, 2).contiguous().transpose(1, 2)
    weights = torch.softmax(torch.stack([lse, part_lse]).double(), 0).transpose(2, 3)[..., None]
    expected = weights[0] * out + weights[1] * part
    total = torch.logaddexp(lse.double(), part_lse.double())
    result, before = torch.full((b, n, h, d), torch.nan, dtype=dtype, device=DEVICE), out.clone()
    MERGES[how](out, lse, part, part_lse, result)
    assert out.equal(before)
    torch.testing.assert_close(lse.double(), total, rtol=1e-6, atol=1e-6)
    # One rounding to the dtype (Triton's interpreter cuts bfloat16 off instead), and the merge's own in float32.
    rounding = 1 if dtype == torch.bfloat16 and DEVICE == "cpu" and how == "triton" else 1 / 2
    allowed = rounding * torch.finfo(dtype).eps * expected.abs() + 4 * torch.finfo(torch.float32).eps * 4
    assert (result.double() - expected).abs().le(allowed).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a race of warps shows only among many")
def test_many_rows_at_once():
    shape = (1, 8192, 16, 128)
    for seed in range(5):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        out, part = (torch.randn(shape, generator=generator, device=DEVICE) for _ in range(2))
        lse, part_lse = (3 * torch.randn(1, 16, 8192, generator=generator, device=DEVICE) for _ in range(2))
        weights = torch.softmax(torch.stack([lse, part_lse]).double(), 0).transpose(2, 3)[..., None]
        expected = weights[0] * out + weights[1] * part
        merge(out, lse, part, part_lse, out)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_a_part_shows_nothing_to_are_not_read_or_written():
    out, lse = torch.ones(1, 20, 1, 16, device=DEVICE), torch.zeros(1, 1, 20, device=DEVICE)
    part, part_lse = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    part[:, 3], part_lse[:, :, 3] = 3.0, 0.0
    merge(out, lse, part, part_lse, out)
    assert (out[:, 3] == 2).all() and out.isfinite().all() and out.sum() == 21 * 16
    with pytest.raises(ValueError, match="last dimension of part must be contiguous"):
        merge(out, lse, part.transpose(1, 3).contiguous().transpose(1, 3), part_lse, out)


@pytest.mark.parametrize("width", [(1, 2, 8), (2, 3, 800)])
def test_gradients_that_return_are_added_in_the_order_of_ranks(width):
    """By the kernel, bit for bit what one addition after another gives; rows wanted by none, one and several ranks."""
    plan = ShardPlan.build(builders.causal_document([40, 61]), 4, chunk_size=5, num_stages=3)
    generator = torch.Generator().manual_seed(1)
    counts = []
    for rank in range(4):
        stages = plan.local(rank).stages
        total = torch.randn(len(plan.rows(rank)), *width, generator=generator)
        for stage in stages[1:]:
            returned = torch.randn(len(stage.send_rows), *width, generator=generator)
            expected, got = total.clone(), total.to(DEVICE)
            add_gradients_(expected, stage, returned)
            add_rows(got, returned.to(DEVICE), stage.return_rows.to(DEVICE), stage.return_order.to(DEVICE))
            assert got.cpu().equal(expected)
            counts += torch.bincount(stage.send_rows, minlength=len(total)).tolist()
    assert {0, 1, 2} <= set(counts)
