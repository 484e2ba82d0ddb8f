"""Merging partial attention: many parts against float64 over all keys, and rows that see nothing."""

import pytest
import torch

from fm_longctx.context_parallel.merge import merge_


def part_of(scores, values):
    """out `[1, N, H, D]` and lse `[1, H, N]` of scores `[1, H, N, M]` over values `[1, M, H, D]`, -inf safe."""
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return torch.einsum("bhnm,bmhd->bnhd", weights, values), lse


@pytest.mark.parametrize("parts", [1, 2, 64])
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_many_parts_equal_the_whole(parts, spread):
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
        [x.float() for x in part_of(s, v)] for s, v in zip(scores.split(5, dim=-1), values.split(5, dim=1), strict=True)
    ]
    out, lse = pieces[0]
    for piece in pieces[1:]:
        merge_(out, lse, *piece)
    unseen = expected_lse == -torch.inf
    assert lse.isneginf().equal(unseen) and unseen[:, :, 3].all()
    assert (out[:, 3] == 0).all()
    eps = torch.finfo(torch.float32).eps
    # Each part's lse and average were rounded once; an error e in the difference of two lse is a factor 1 + e.
    largest = expected_lse.masked_fill(unseen, 0).abs().max()
    assert (lse - expected_lse).masked_fill(unseen, 0).abs().max() <= 4 * eps * largest
    assert (out - expected).abs().max() <= 8 * eps * (1 + largest) * expected.abs().max()


def test_the_order_of_empty_parts_does_not_matter():
    out, lse = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 1.5)
    nothing, never = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -torch.inf)
    for first, second in (((out, lse), (nothing, never)), ((nothing, never), (out, lse))):
        merged, total = first[0].clone(), first[1].clone()
        merge_(merged, total, *second)
        assert merged.equal(out) and total.equal(lse)
    merged, total = nothing.clone(), never.clone()
    merge_(merged, total, nothing, never)
    assert merged.equal(nothing) and total.equal(never)
