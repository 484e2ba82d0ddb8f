"""The library's version, its absence, and the loss function."""

import builtins
import sys
import warnings

import pytest
import torch
from megatron import core

from fm_longctx.integrations import megatron as megatron_plug
from fm_longctx.integrations.megatron import per_token_loss
from fm_longctx.integrations.megatron.refusals import check_version


def test_an_untested_version_is_told(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version()
    monkeypatch.setattr(core, "__version__", "0.19.0")
    with pytest.warns(UserWarning, match=r"tested with megatron-core 0\.16\.1 and this is 0\.19\.0"):
        check_version()


def test_a_missing_library_is_told(monkeypatch):
    real = builtins.__import__

    def without_megatron(name, *args, **kwargs):
        if name.split(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_megatron)
    monkeypatch.delitem(sys.modules, f"{megatron_plug.__name__}.params", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'fm_longctx\[megatron\]'"):
        _ = megatron_plug.FlashMaskParams


def test_the_loss_function():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    total, labels, report = per_token_loss(mask, losses)
    assert total == 37 and labels == 3 and labels.dtype == torch.int32
    assert report["lm loss"].tolist() == [37, 3] and not report["lm loss"].requires_grad
    total.backward()
    assert losses.grad.equal(mask)
