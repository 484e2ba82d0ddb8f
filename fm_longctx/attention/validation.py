"""What `flashmask_attention` accepts; anything else is a ValueError that says how to mend it."""

from torch import Tensor

from fm_longctx.mask import FlashMask


def validate(q: Tensor, k: Tensor, v: Tensor, mask: FlashMask) -> None:
    """Raise a ValueError unless q, k, v and mask fit together. Shapes as in `flashmask_attention`."""
    if not isinstance(mask, FlashMask):
        raise ValueError(
            f"mask must be a FlashMask, got {type(mask).__name__}. Build one with FlashMask.from_startend_row_indices, "
            "FlashMask.from_dense or a builder in fm_longctx.mask."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, N, H, D], got {list(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}.")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}.")
    b, n_q, h, d = q.shape
    if k.shape[0] != b or v.shape[0] != b:
        raise ValueError(f"q, k and v must have one batch size, got {b}, {k.shape[0]} and {v.shape[0]}.")
    if k.shape[3] != d:
        raise ValueError(f"q and k must have one head dimension, got {d} and {k.shape[3]}.")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must agree in length and heads, got {list(k.shape)} and {list(v.shape)}.")
    n_k, h_kv = k.shape[1], k.shape[2]
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got {h} and {h_kv}.")
    if (mask.num_rows, mask.num_columns) != (n_q, n_k):
        raise ValueError(
            f"the mask has {mask.num_rows} rows x {mask.num_columns} columns, but q has {n_q} positions and k has "
            f"{n_k}."
        )
    if mask.batch not in (1, b):
        raise ValueError(f"the mask's batch must be 1 or {b} (q's batch), got {mask.batch}.")
    if mask.heads not in (1, h_kv, h):
        raise ValueError(
            f"the mask's heads must be 1, {h_kv} (key/value heads) or {h} (query heads), got {mask.heads}."
        )
    if mask.device != q.device:
        raise ValueError(f"the mask is on {mask.device} but q is on {q.device}. Move it with mask.to(q.device).")
