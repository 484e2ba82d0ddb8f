"""Making the attention known to transformers under its name."""

from __future__ import annotations

import warnings

NAME = "fm_longctx"
"""The name to pass as `attn_implementation`."""

# Lower bound that works, and the newest that the tests ran with.
_OLDEST, _NEWEST_TESTED = (5, 17), (5, 23)


def register() -> None:
    """Make `attn_implementation="fm_longctx"` known to transformers. Calling it again changes nothing.

    Warns of a transformers newer than the tested ones.

    Raises:
        ValueError: transformers is not installed, or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "the Hugging Face integration needs transformers 5.17 or later. Install it with: pip install "
            "'fm_longctx[hf]'."
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ValueError(
            f"transformers {transformers.__version__} is too old: the integration needs 5.17 or later. Install it "
            "with: pip install 'fm_longctx[hf]'."
        )
    if version > _NEWEST_TESTED:
        warnings.warn(
            f"fm_longctx was tested with transformers 5.17 to 5.23, not {transformers.__version__}.", stacklevel=2
        )
    from fm_longctx.integrations.transformers.layer import attention
    from fm_longctx.integrations.transformers.masks import request_mask

    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, request_mask)
