"""FlashMask and its builders. Pure torch: knows nothing of kernels or ranks."""

from fm_longctx.mask.builders import (
    causal,
    causal_blockwise,
    causal_document,
    document,
    full,
    global_sliding_window,
    lambda_window,
    prefix_lm_causal,
    prefix_lm_document,
    prefix_tree,
    qk_sparse,
    random_eviction,
    shared_question,
    sliding_window,
)
from fm_longctx.mask.flash_mask import FlashMask

__all__ = [
    "FlashMask",
    "causal",
    "causal_blockwise",
    "causal_document",
    "document",
    "full",
    "global_sliding_window",
    "lambda_window",
    "prefix_lm_causal",
    "prefix_lm_document",
    "prefix_tree",
    "qk_sparse",
    "random_eviction",
    "shared_question",
    "sliding_window",
]
