"""dQ's sum in the order of the Hopper kernel's threads, put in the order of rows and columns."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from fm_longctx.kernels.hopper.launch import _scaled
from tests.attention.oracle import DEVICE


def as_threads_hold_it(x: Tensor) -> Tensor:
    """x `[B, N, H, D]` with each 64 x 64 tile in the order of a wgmma accumulator's owners (PTX ISA, register fragments
    of wgmma.mma_async.m64nNk16): all threads' first four registers, then their next four."""
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    register = column // 8 * 4 + row % 16 // 8 * 2 + column % 2
    place = register // 4 * 512 + thread * 4 + register % 4
    held = torch.empty_like(x)
    for m in range(0, x.shape[1], 64):
        for d in range(0, x.shape[3], 64):
            tile = x[:, m : m + 64, :, d : d + 64].transpose(1, 2).flatten(2)
            flat = torch.empty_like(tile)
            flat[..., place.flatten()] = tile
            held[:, m : m + 64, :, d : d + 64] = flat.unflatten(2, (64, 64)).transpose(1, 2)
    return held


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("n_q, dtype", [(128, torch.float32), (100, torch.float32), (100, torch.float16)])
def test_sum_in_order(n_q, dtype, d):
    x = torch.randn(2, 128, 3, d)
    held = as_threads_hold_it(x).to(DEVICE)
    out = _scaled(held, 0.5, n_q, dtype)
    assert torch.equal(out.cpu(), (0.5 * x[:, :n_q]).to(dtype))
    # The largest tensor of a backward is not there twice.
    assert (out.data_ptr() == held.data_ptr()) == (n_q == 128)
