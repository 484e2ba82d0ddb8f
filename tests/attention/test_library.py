"""What PyTorch's other parts need of the op: opcheck, compile, checkpointing, autocast."""

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fm_longctx import flashmask_attention
from fm_longctx.attention import library, passes
from fm_longctx.kernels import schedule
from fm_longctx.mask import builders
from tests.attention.oracle import DEVICE, random_inputs


def inputs_and_mask(n=70, **kwargs):
    q, k, v = random_inputs(rows=n, **kwargs)
    return q, k, v, builders.causal_document([n // 3, n - n // 3]).to(DEVICE)


def needed(module, q, v, mask, backward):
    return module.schedules_needed(q, v, mask, backward=backward, deterministic=False)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck(backend, softcap):
    q, k, v, mask = inputs_and_mask()
    module = passes.load_backend(backend)
    keys = list(dict.fromkeys(needed(module, q, v, mask, False) + needed(module, q, v, mask, True)))
    schedules = [x for built in module.schedules(mask, keys) for x in built]
    flat = [int(part) for key in keys for part in key]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, mask.starts, mask.ends, schedules, flat, mask.causal, 0.2, softcap, backend, False)
    torch.library.opcheck(library._forward, arguments)


@pytest.mark.parametrize("by_row", [True, False])
def test_opcheck_of_the_schedule(by_row):
    _, _, _, mask = inputs_and_mask()
    # Where a run is put in the pool is not told: only what is read of it must repeat.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        schedule._build_traced, (mask.starts, mask.ends, 70, True, [32, 16, by_row], True), test_utils=tests
    )


@pytest.mark.parametrize("cold", [True, False])
def test_compiles_as_one_graph(backend, cold):
    q, k, v, mask = inputs_and_mask()

    def layer(q, k, v):
        return flashmask_attention(q * 2, k, v, mask, backend=backend) + 1

    expected = torch.autograd.functional.vjp(layer, (q, k, v), torch.ones_like(q))
    if cold:
        mask.cache.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = torch.autograd.functional.vjp(compiled, (q, k, v), torch.ones_like(q))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Watched(TorchDispatchMode):
    """Notes the names of our ops."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [func.name()] if func.namespace == "fm_longctx" else []
        return func(*args, **(kwargs or {}))


def test_the_op_is_registered_for_those_who_look_and_left_out_where_nobody_does(backend):
    q, k, v, mask = inputs_and_mask()
    results = []
    for mode in (contextlib.nullcontext(), Watched()):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with mode:
            out, lse = flashmask_attention(*leaves, mask, return_lse=True, backend=backend)
            (out.square().sum() + lse[lse.isfinite()].sum()).backward()
        results.append([out, lse, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert mode.seen == ["fm_longctx::attention", "fm_longctx::attention_backward"]
    with mock.patch.object(library, "_forward", side_effect=AssertionError("the registered op")):
        flashmask_attention(q, k, v, mask, backend=backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        out = flashmask_attention(*(fake.from_tensor(x) for x in (q, k, v)), mask, backend=backend)
        assert isinstance(out, FakeTensor) and out.shape == q.shape


def test_there_is_no_second_derivative(backend):
    q, k, v, mask = inputs_and_mask()
    out = flashmask_attention(q.requires_grad_(), k, v, mask, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate"):
        dq.sum().backward()


def test_activation_checkpointing_gives_the_same_gradients(backend):
    q, k, v, mask = inputs_and_mask()
    grads = []
    for wrap in (lambda fn, *x: fn(*x), lambda fn, *x: checkpoint(fn, *x, use_reentrant=False)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        wrap(lambda q, k, v: flashmask_attention(q, k, v, mask, backend=backend), *leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_chooses_the_dtype(backend):
    q, k, v, mask = inputs_and_mask()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = flashmask_attention(q, k, v.bfloat16(), mask, backend=backend)
    expected = flashmask_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_schedules_are_built_once_and_only_those_needed(backend, needs_grad):
    q, k, v, mask = inputs_and_mask()
    q.requires_grad_(needs_grad)
    flashmask_attention(q, k, v, mask, backend=backend)
    built = dict(mask.cache)
    module = passes.load_backend(backend)
    keys = set(needed(module, q, v, mask, False)) | (set(needed(module, q, v, mask, True)) if needs_grad else set())
    assert {key[1:] for key in built if key != "bounds"} == keys
    flashmask_attention(q, k, v, mask, backend=backend).sum()
    assert all(mask.cache[key] is tiles for key, tiles in built.items())


def test_strict_determinism_is_honoured(monkeypatch):
    asked = []

    def record(*args, deterministic, **options):
        asked.append(deterministic)
        return passes.attention_backward(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(library, "attention_backward", record)
    q, k, v, mask = inputs_and_mask()
    q.requires_grad_()
    for given, strict in ((False, False), (True, False), (False, True)):
        torch.use_deterministic_algorithms(strict)
        flashmask_attention(q, k, v, mask, deterministic=given).sum().backward()
    assert asked == [False, True, True]
