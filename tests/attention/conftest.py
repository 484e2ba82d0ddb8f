"""Small reference tiles, so that short sequences have many; outputs that nobody writes are NaN."""

import pytest
import torch

from fm_longctx.attention import reference


@pytest.fixture(autouse=True)
def small_reference_tiles(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_M", 32)
    monkeypatch.setattr(reference, "BLOCK_N", 16)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    return request.param
