"""A batch of masks is the masks, one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_longctx import FlashMask
from fm_longctx.mask import causal, causal_document, full
from tests.mask.oracle import dense_of_intervals, raw_masks
from tests.properties import examples


@settings(max_examples=examples(40))
@given(st.lists(raw_masks(shape=(1, 2, 5, 6)), min_size=1, max_size=3))
def test_any_masks(raws):
    masks = [FlashMask(r.starts, r.ends, causal=r.causal, num_rows=r.num_rows) for r in raws]
    stacked = FlashMask.stack(masks)
    want = torch.cat([dense_of_intervals(r) for r in raws])
    assert torch.equal(stacked.to_dense(), want)
    # Canonical, so that equal batches have equal fingerprints.
    again = FlashMask(stacked.starts, stacked.ends, causal=stacked.causal, num_rows=5)
    assert again.fingerprint() == stacked.fingerprint()


def test_documents_stay_causal_with_one_interval():
    stacked = FlashMask.stack([causal_document([3, 4]), causal(7)])
    assert (stacked.batch, stacked.num_intervals, stacked.causal) == (2, 1, True)


def test_one_head_stands_for_many():
    per_head = FlashMask(
        torch.tensor([[[[2, 3, 3]], [[3, 3, 3]]]], dtype=torch.int32),
        torch.full((1, 2, 1, 3), 3, dtype=torch.int32),
        causal=True,
    )
    stacked = FlashMask.stack([per_head, full(3)])
    assert torch.equal(stacked.to_dense(), torch.cat([per_head.to_dense(), torch.ones(1, 2, 3, 3, dtype=torch.bool)]))


def test_refused():
    with pytest.raises(ValueError, match="no mask to stack"):
        FlashMask.stack([])
    with pytest.raises(ValueError, match="same rows, columns and device, got 3 x 3 on cpu and 4 x 4"):
        FlashMask.stack([causal(3), causal(4)])
    three = FlashMask(*(torch.zeros((1, 3, 1, 4), dtype=torch.int32),) * 2, causal=False)
    two = FlashMask(*(torch.zeros((1, 2, 1, 4), dtype=torch.int32),) * 2, causal=False)
    with pytest.raises(ValueError, match="as many heads, or one, got 2 and 3"):
        FlashMask.stack([two, three])
