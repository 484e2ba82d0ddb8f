"""FlashMask and its builders. Pure torch: knows nothing of kernels or ranks."""

from fm_longctx.mask.flash_mask import FlashMask

__all__ = ["FlashMask"]
