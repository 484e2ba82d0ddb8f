"""The suite for compute-sanitizer is sound: it has every kind of mask, and its checks hold and can fail."""

import pytest
import torch

from tests.attention import memcheck


def test_every_kind_of_mask_is_there():
    every = list(memcheck.variants(41))
    masks = [variant.mask for variant in every]
    assert {mask.num_intervals for mask in masks} >= {0, 1, 2, 3, 4, 5}
    assert {(mask.batch, mask.heads) for mask in masks} >= {(1, 1), (2, 1), (1, 2), (1, 4), (2, 4)}
    assert {mask.causal for mask in masks} == {True, False}
    assert {mask.num_rows < mask.num_columns for mask in masks} == {True, False}
    assert any(mask.num_rows > mask.num_columns for mask in masks)
    assert any(not variant.visible.any(-1).all() for variant in every), "rows that see nothing"
    assert all(torch.equal(mask.to_dense(), variant.visible) for mask, variant in zip(masks, every, strict=True))


def test_a_run_checks_and_says_what_it_left_out(backend):
    variant = list(memcheck.variants(25))[-1]
    assert memcheck.run(variant, backend, 16, torch.float32)
    assert not memcheck.run(variant, "triton", 300, torch.float32)
    wrong = variant._replace(visible=~variant.visible)
    with pytest.raises(AssertionError):
        memcheck.run(wrong, backend, 16, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only")
def test_it_refuses_to_run_where_it_would_show_nothing():
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        memcheck.main()
