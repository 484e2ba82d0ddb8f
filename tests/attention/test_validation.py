"""Every refusal says what was given and what to do."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from fm_longctx import FlashMask, flashmask_attention
from fm_longctx.attention import passes
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, random_inputs


def refused(match, q=None, k=None, v=None, mask=None, **options):
    defaults = random_inputs(batch=2, rows=8, heads=4, kv_heads=2, d=16)
    q, k, v = (default if x is None else x for x, default in zip((q, k, v), defaults, strict=True))
    with pytest.raises(ValueError, match=match):
        flashmask_attention(q, k, v, builders.causal(8).to(DEVICE) if mask is None else mask, **options)


def test_shapes():
    zeros = lambda *shape: torch.zeros(shape, device=DEVICE)  # noqa: E731
    refused(r"q must be \[B, N, H, D\], got \[8, 4, 16\]", q=zeros(8, 4, 16))
    refused("one head dimension, got 16 and 24", k=zeros(2, 8, 2, 24))
    refused("one batch size, got 2, 1 and 2", k=zeros(1, 8, 2, 16))
    refused("agree in length and heads", v=zeros(2, 9, 2, 16))
    refused("multiple of the key/value heads, got 4 and 3", k=zeros(2, 8, 3, 16), v=zeros(2, 8, 3, 16))


def test_dtypes():
    refused("q must be floating point, got torch.int64", q=torch.zeros(2, 8, 4, 16, dtype=torch.int64, device=DEVICE))
    refused(
        "one dtype, got torch.float32, torch.float16", k=torch.zeros(2, 8, 2, 16, dtype=torch.float16, device=DEVICE)
    )


def test_masks():
    refused("mask must be a FlashMask, got Tensor", mask=torch.ones(8, 8))
    refused("mask has 9 rows x 9 columns, but q has 8 positions and k has 8", mask=builders.causal(9).to(DEVICE))
    blank = torch.zeros(1, 1, 0, 8, dtype=torch.int32, device=DEVICE)
    refused(
        r"batch must be 1 or 2 .*, got 3",
        mask=FlashMask(blank.repeat(3, 1, 1, 1), blank.repeat(3, 1, 1, 1), causal=True),
    )
    three = blank.repeat(1, 3, 1, 1)
    refused(r"heads must be 1, 2 .* or 4 .*, got 3", mask=FlashMask(three, three, causal=True))
    refused("Move it with mask.to", mask=builders.causal(8).to("meta"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale(scale):
    refused("scale must be positive and finite", scale=scale)


def test_backends():
    refused(r"backend must be one of \['hopper', 'reference', 'triton'\] or None, got 'flash'", backend="flash")
    doubles = [x.double() for x in random_inputs(batch=2, rows=8, heads=4, kv_heads=2, d=16)]
    refused("backend='triton' takes float32, float16 or bfloat16, got torch.float64", *doubles, backend="triton")
    wide = random_inputs(batch=2, rows=8, heads=4, kv_heads=2, d=300)
    refused("head dimensions up to 256, got 300", *wide, backend="triton")


def test_a_slower_choice_on_a_hopper_gpu_is_announced_once_a_reason(monkeypatch):
    refusals = {"hopper": "takes masks of up to 3 intervals a column, got 4", "triton": None, "reference": None}
    modules = {name: SimpleNamespace(refusal=lambda *_, text=text: text) for name, text in refusals.items()}
    monkeypatch.setattr(passes, "load_backend", modules.__getitem__)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q = SimpleNamespace(device=torch.device("cuda"))
    passes._announce.cache_clear()
    with pytest.warns(UserWarning, match="takes 'triton': 'hopper', the fastest on this GPU, takes masks of up to 3"):
        assert passes.resolve_backend(None, q, q, 4) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert passes.resolve_backend(None, q, q, 4) == "triton"  # said before
        assert passes.resolve_backend("triton", q, q, 4) == "triton"  # asked for
        capability = (8, 0)
        passes._announce.cache_clear()
        assert passes.resolve_backend(None, q, q, 4) == "triton"  # nothing else to expect
        capability = (9, 0)
        modules["hopper"].refusal = lambda *_: None
        assert passes.resolve_backend(None, q, q, 4) == "hopper"


def test_unknown_options_are_refused():
    q, k, v = random_inputs(rows=8)
    with pytest.raises(TypeError, match="dropout_p"):
        flashmask_attention(q, k, v, builders.causal(8).to(DEVICE), dropout_p=0.1)
