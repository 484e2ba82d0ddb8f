"""Tiny models of each family, with random weights that make attention matter, and what they are compared on."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

WINDOW = 9
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
# Family -> (config class, changes, the window of each of its three layers).
FAMILIES = {
    "llama": (LlamaConfig, {}, (None,) * 3),
    "qwen3": (Qwen3Config, {}, (None,) * 3),
    "qwen3-sliding": (
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        (None, WINDOW, WINDOW),
    ),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}, (WINDOW,) * 3),
    "gemma2": (
        Gemma2Config,
        {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, **LAYERS},
        (WINDOW, None, WINDOW),
    ),
    "gemma3": (Gemma3TextConfig, {"query_pre_attn_scalar": 8, **LAYERS}, (WINDOW, None, WINDOW)),
    "gpt-oss": (
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, **LAYERS},
        (WINDOW, None, WINDOW),
    ),
}
ALL = list(FAMILIES)


def make(family, implementation, **changes):
    """A three-layer model of the family, the same weights for every implementation."""
    config_class, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = config_class(**common | own | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0, 1.0)
    return model


def dense(family, visible):
    """The dense 4-D masks, float, that mean `visible` (bool `[B or 1, N, N]`): one, or one for each kind of layer."""
    windows = FAMILIES[family][2]
    n = visible.shape[-1]
    near = torch.arange(n)[:, None] - torch.arange(n) < WINDOW

    def additive(mask):
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None]

    if set(windows) == {None}:
        return additive(visible)
    if set(windows) == {WINDOW}:
        return additive(visible & near)
    return {"full_attention": additive(visible), "sliding_attention": additive(visible & near)}


def gradients(model, logits, counted=None):
    """Logits where they count, and the gradient of every parameter."""
    counted = torch.ones(logits.shape[:2], dtype=torch.bool) if counted is None else counted
    model.zero_grad()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits.log_softmax(-1) * weight)[counted].sum().backward()
    return {"logits": logits.detach()[counted]} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_close(got, want, tolerance=3e-5):
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert (got[name] - exact).abs().max() <= tolerance * exact.abs().max(), name
