"""Chunked cross-entropy against the whole logits in float64."""

import pytest
import torch
import torch.nn.functional as F

from fm_longctx.train.loss import chunked_cross_entropy


def case(n, c, v, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, c, generator=generator).to(dtype)
    weight = torch.randn(v, c, generator=generator).to(dtype)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.2] = -100
    return hidden, weight, labels


def whole(hidden, weight, labels, scale):
    """Loss and gradients from all logits at once, in float64."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, labels, ignore_index=-100, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), h.grad, w.grad


def chunked(hidden, weight, labels, scale, chunk):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = chunked_cross_entropy(h, w, labels, chunk=chunk)
    (loss * scale).backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("chunk", [1, 16, 63, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_whole_logits(chunk, dtype, tolerance):
    hidden, weight, labels = case(63, 24, 111, dtype)
    for mine, exact in zip(
        chunked(hidden, weight, labels, 0.37, chunk), whole(hidden, weight, labels, 0.37), strict=True
    ):
        assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_bfloat16_keeps_the_loss_in_float32_and_rounds_gradients_once():
    """The sum of 2000 losses: bf16 sums would be off by whole nats; and the weight's gradient by many roundings."""
    hidden, weight, labels = case(2001, 24, 111, torch.bfloat16)
    loss, d_hidden, d_weight = chunked(hidden, weight, labels, 1 / 1600, 8)
    exact, exact_hidden, exact_weight = whole(hidden, weight, labels, 1 / 1600)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) <= 1e-6 * float(exact)
    epsilon = torch.finfo(torch.bfloat16).eps
    # d logits is rounded once (a product's operand) and the gradient once.
    for mine, want in ((d_hidden, exact_hidden), (d_weight, exact_weight)):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - want).abs().max() <= epsilon * want.abs().max()


def test_leading_dimensions_and_no_labels():
    hidden, weight, labels = case(30, 8, 20, torch.float32)
    flat = chunked(hidden, weight, labels, 1.0, 7)
    shaped = chunked(hidden.view(2, 15, 8), weight, labels.view(2, 15), 1.0, 7)
    assert torch.equal(flat[0], shaped[0])
    assert torch.equal(flat[1], shaped[1].flatten(0, 1))
    none = chunked(hidden, weight, torch.full_like(labels, -100), 1.0, 7)
    assert [float(x.abs().max()) for x in none] == [0.0, 0.0, 0.0]


def test_without_gradients_nothing_is_computed_for_them():
    hidden, weight, labels = case(30, 8, 20, torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, chunk=7)
    assert torch.allclose(loss, whole(hidden, weight, labels, 1.0)[0].float())
    frozen = weight.clone()
    moving = hidden.clone().requires_grad_()
    chunked_cross_entropy(moving, frozen, labels).backward()
    assert torch.allclose(moving.grad, whole(hidden, weight, labels, 1.0)[1].float(), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, w, y: (h, w, y[:-1]), "do not fit together"),
        (lambda h, w, y: (h, w[:, :-1], y), "do not fit together"),
        (lambda h, w, y: (h, w.double(), y), "one dtype"),
        (lambda h, w, y: (h, w, y.int()), "labels must be int64"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(*change(*case(30, 8, 20, torch.float32)))
