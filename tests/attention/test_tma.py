"""The kernels that fetch by TMA, interpreted: what the blocks of recent GPUs do, at lengths that divide by nothing."""

import math

import pytest
import torch

from fm_longctx import FlashMask, flashmask_attention
from fm_longctx.kernels import portable
from fm_longctx.kernels.blocks import Block, Blocks, choose
from tests.attention.oracle import DEVICE, Result, check, gradients, random_inputs, visit_every_tile
from tests.attention.variants import interval_variants

SHAPE = {"batch": 2, "heads": 2, "kv_heads": 1}
BLOCKS = (
    Blocks(*[Block(32, 32, 1, 1, tma=True, late=True)] * 3)
    if DEVICE == "cpu"
    else choose((9, 0), 2, 128, 1, True, 1 << 17)
)


@pytest.fixture
def fetches(monkeypatch):
    """(tensor, what stands for it in the kernel) of each fetch, in a world of kernels that fetch by TMA."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    seen = []
    describe = portable._rows_of
    monkeypatch.setattr(portable, "choose", lambda *_: BLOCKS)
    monkeypatch.setattr(portable, "_rows_of", lambda x, *rest: seen.append((x, describe(x, *rest))) or seen[-1][1])
    assert all(block.tma for block in BLOCKS)
    return seen


def attend(mask):
    return lambda q, k, v: flashmask_attention(q, k, v, mask, return_lse=True, backend="triton")


def variant_of(rows, columns, index):
    variant = list(interval_variants(rows, columns, **SHAPE))[index]
    return variant.mask.to(DEVICE), variant.visible.to(DEVICE)


# 0, 0, 1, 2 and 5 intervals a column; the second, third and fifth are causal.
@pytest.mark.parametrize(
    "index, rows, columns, d, d_v",
    [(0, 1, 37, 32, 32), (1, 45, 70, 24, 40), (3, 33, 1, 32, 32), (4, 40, 33, 32, 32), (11, 45, 70, 40, 24)],
)
def test_outputs_and_gradients(fetches, index, rows, columns, d, d_v):
    mask, visible = variant_of(rows, columns, index)
    dtype = torch.bfloat16 if index == 4 else torch.float16
    q, k, v = random_inputs(rows=rows, columns=columns, d=d, d_v=d_v, dtype=dtype, **SHAPE)
    check(attend(mask), q, k, v, visible, 1 / math.sqrt(d))
    # K and V of the forward and of dQ, Q and the output's gradient of dK and dV.
    assert len(fetches) == 6 and all(made is not x for x, made in fetches)


def test_skipping_changes_no_bit(fetches):
    n = 4 * BLOCKS.key.n - 5
    starts = torch.arange(n, dtype=torch.int32)[None, None, None] // 40 * 40 + 40
    mask = FlashMask(starts, torch.full_like(starts, n), causal=True, num_rows=n).to(DEVICE)
    inputs = random_inputs(rows=n, d=32, dtype=torch.float16, **SHAPE)
    skipping = gradients(attend(mask), *inputs, torch.ones_like(inputs[0]))
    visit_every_tile(mask)
    visiting = gradients(attend(mask), *inputs, torch.ones_like(inputs[0]))
    for name, a, b in zip(Result._fields, skipping, visiting, strict=True):
        assert torch.equal(a, b), name


def test_views_that_tma_cannot_read_are_copied(fetches):
    """Storage that begins at an odd element; heads of a projection whose tokens are 8 bytes off a multiple of 16."""
    rows, d = 45, 32
    mask, _ = variant_of(rows, rows, 3)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3 + 2 * rows * 4 * d, generator=generator).to(DEVICE, torch.float16)
    odd = torch.randn(2, rows, 4 * d + 4, generator=generator).to(DEVICE, torch.float16)
    for packed in (flat[3:].view(2, rows, 4, d), odd[..., : 4 * d].unflatten(-1, (4, d))):
        views = packed.split([2, 1, 1], dim=2)
        results = []
        for inputs in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
            results.append(gradients(attend(mask), *inputs, torch.ones_like(inputs[0])))
        for name, a, b in zip(Result._fields, *results, strict=True):
            assert torch.equal(a, b), name
    assert any(x.data_ptr() % 16 for x, _ in fetches)
    assert any(x.stride(1) * 2 % 16 for x, _ in fetches)


def test_heads_that_tma_cannot_read_go_by_pointers(fetches):
    """100 bytes a head are no multiple of 16."""
    rows, d = 33, 50
    mask, visible = variant_of(rows, rows, 3)
    q, k, v = random_inputs(rows=rows, d=d, dtype=torch.float16, **SHAPE)
    check(attend(mask), q, k, v, visible, 1 / math.sqrt(d))
    assert len(fetches) == 6 and all(made is x for x, made in fetches)
