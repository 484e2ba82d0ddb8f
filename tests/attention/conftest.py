"""Small reference tiles, so that short sequences have many; outputs that nobody writes are NaN."""

import pytest
import torch

from fm_longctx.attention import reference


@pytest.fixture(autouse=True)
def small_reference_tiles(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_M", 32)
    monkeypatch.setattr(reference, "BLOCK_N", 16)


@pytest.fixture(autouse=True)
def poisoned_empty():
    """torch.empty gives NaN in this mode."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    return request.param
