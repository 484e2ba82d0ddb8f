"""attn_implementation="fm_longctx": the mask reaches every layer, equals a dense one, and is never dropped silently."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from fm_longctx import ContextParallel, FlashMask, ShardPlan
from fm_longctx.integrations import transformers as integration
from fm_longctx.mask import builders

LENGTHS = [20, 1, 42]
N = sum(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def make(implementation, config_class=LlamaConfig, **changes):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        **changes,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


def documents():
    tokens = torch.randint(0, 64, (2, N), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    owner = [d for d, n in enumerate(LENGTHS) for _ in range(n)]
    visible = torch.tensor([[r >= c and owner[r] == owner[c] for c in range(N)] for r in range(N)])
    return tokens, positions, visible


def outcome(model, **keywords):
    """Logits and the gradient of every parameter."""
    tokens, positions, _ = documents()
    model.zero_grad()
    logits = model(tokens, position_ids=positions, use_cache=False, **keywords).logits
    (logits.log_softmax(-1)[..., :7].square().sum()).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keyword", ["flashmask", "context"])
def test_equals_sdpa_with_the_dense_mask(config_class, checkpointing, keyword):
    visible = documents()[2]
    want = outcome(make("sdpa", config_class), attention_mask=visible.expand(2, 1, N, N))
    model = make(integration.NAME, config_class)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mask = FlashMask.from_lengths(LENGTHS)
    value = mask if keyword == "flashmask" else ContextParallel(None, ShardPlan.build(mask, 1), mask)
    for mine, exact in zip(outcome(model, **{keyword: value}), want, strict=True):
        assert (mine - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_a_window_already_in_the_mask_is_accepted():
    visible = documents()[2] & (torch.arange(N)[:, None] - torch.arange(N) < 9)
    changes = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
    reference = outcome(make("sdpa", Qwen3Config), attention_mask=visible.expand(2, 1, N, N))
    mask = FlashMask.from_lengths(LENGTHS) & builders.sliding_window(N, 9)
    model = make(integration.NAME, Qwen3Config, **changes)
    assert {layer.self_attn.sliding_window for layer in model.model.layers} == {9}
    context = ContextParallel(None, ShardPlan.build(mask, 1), mask)
    for keyword in ({"flashmask": mask}, {"context": context}):
        for mine, exact in zip(outcome(model, **keyword), reference, strict=True):
            assert (mine - exact).abs().max() <= 2e-5 * exact.abs().max()
    wide = FlashMask.from_lengths(LENGTHS)
    for keyword in ({"flashmask": wide}, {"context": ContextParallel(None, ShardPlan.build(wide, 1), wide)}):
        with pytest.raises(ValueError, match="sliding_window=9, and the mask shows tokens outside it"):
            outcome(model, **keyword)


MASK = FlashMask.from_lengths(LENGTHS)


@pytest.mark.parametrize(
    "changes, keywords, message",
    [
        ({}, {}, "pass exactly one of flashmask= .* got neither"),
        ({}, {"flashmask": MASK, "context": object()}, "got both"),
        ({"attention_dropout": 0.1}, {"flashmask": MASK}, "attention dropout 0.1 is not supported"),
        ({}, {"flashmask": MASK, "attention_mask": torch.ones(2, 1, N, N, dtype=torch.bool)}, "cannot be combined"),
        ({}, {"flashmask": MASK, "attention_mask": torch.arange(N).expand(2, -1) > 3}, "hides tokens"),
        ({}, {"flashmask": MASK, "softcap": 30.0}, "passes softcap"),
        ({}, {"flashmask": FlashMask.from_lengths([N + 1])}, "the mask has 64 rows"),
        ({}, {"flashmask": MASK.to_dense()}, "mask must be a FlashMask, got Tensor"),
        ({}, {"flashmask": MASK.to("meta")}, "the mask is on meta but q is on cpu"),
    ],
)
def test_refuses(changes, keywords, message):
    with pytest.raises(ValueError, match=message):
        outcome(make(integration.NAME, **changes), **keywords)


def test_a_padding_mask_that_hides_nothing_is_accepted():
    model = make(integration.NAME)
    plain = outcome(model, flashmask=MASK)
    padded = outcome(model, flashmask=MASK, attention_mask=torch.ones(2, N, dtype=torch.long))
    assert torch.equal(plain[0], padded[0])


def test_generation_from_a_cache_is_refused():
    model = make(integration.NAME).eval()
    tokens, _, _ = documents()
    first = model(tokens, flashmask=MASK, use_cache=True)
    with pytest.raises(ValueError, match="1 queries meet 64 keys from a cache"):
        model(tokens[:, :1], flashmask=MASK, past_key_values=first.past_key_values, use_cache=True)
