"""The public attention op and its backends."""

from fm_longctx.attention.op import flashmask_attention

__all__ = ["flashmask_attention"]
