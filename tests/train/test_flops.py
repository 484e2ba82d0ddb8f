"""FLOPs by the visible area, counted by hand; peaks by the GPU's name; the clock of exposed waits."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from fm_longctx.context_parallel.waits import measuring, waiting
from fm_longctx.mask import FlashMask
from fm_longctx.train.flops import FlopCount, peak_tflops
from tests.train.tiny import CONFIG, tiny_model


def batch_of(lengths):
    mask = FlashMask.from_lengths(lengths)
    return SimpleNamespace(mask=mask, num_tokens=sum(lengths), visible_area=int(mask.area().sum()))


def by_hand(model, tokens, scores):
    """Every product of the forward, 2 FLOPs a multiplication and addition; three times that with the backward."""
    c, inner, d = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.head_dim
    heads, kv_heads = CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    projections = 2 * c * heads * d + 2 * c * kv_heads * d + 2 * c * heads * d + 2 * c * kv_heads * d
    layer = projections + 3 * 2 * c * inner
    logits = 2 * c * CONFIG.vocab_size
    attention = sum(heads * (2 * d + 2 * d) * area for area in scores)
    return 3 * (tokens * (2 * layer + logits) + attention)


def test_counted_by_hand():
    model = tiny_model()
    flops = FlopCount.of(model.causal_lm, model.causal_lm.config).of_batch(batch_of([5, 3]))
    # Causal documents of 5 and 3 tokens: 15 + 6 visible scores, in each of two layers.
    assert flops == by_hand(model, 8, [21, 21])


def test_a_sliding_layer_counts_its_window():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            MistralConfig(**shape, num_key_value_heads=2, vocab_size=258, sliding_window=2, tie_word_embeddings=True)
        )
    model.config.layer_types = ["full_attention", "sliding_attention"]
    flops = FlopCount.of(model, model.config).of_batch(batch_of([5, 3]))
    # A row sees at most 2 keys: 9 + 5 scores.
    assert flops == by_hand(model, 8, [21, 14])


@pytest.mark.parametrize(
    "gpu, precision, given, peak",
    [
        ("NVIDIA H200", "bfloat16", None, 989.4),
        ("NVIDIA H100 80GB HBM3", "bfloat16", None, 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", None, 756.0),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", None, 312.0),
        ("NVIDIA A100-SXM4-80GB", "float32", None, None),
        ("Something New", "bfloat16", None, None),
        ("Something New", "float32", 50.0, 50.0),
        (None, "bfloat16", None, None),
    ],
)
def test_peaks(gpu, precision, given, peak):
    assert peak_tflops(gpu, precision, given) == peak


def test_the_clock_adds_up_waits_while_it_is_open():
    def wait():
        with waiting(torch.device("cpu")):
            time.sleep(0.01)

    wait()
    with measuring() as clock:
        wait()
        wait()
        assert 0.02 <= clock.take() < 0.5
        assert clock.take() == 0
    wait()
    assert clock.take() == 0
