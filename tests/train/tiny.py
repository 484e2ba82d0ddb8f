"""Small models and made-up sequences, shared by the training tests."""

import numpy as np
import torch

from fm_longctx.data import assemble
from fm_longctx.train.config import ModelConfig
from fm_longctx.train.model import build, materialize

CONFIG = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)


def tiny_model(config=CONFIG, *, dtype=torch.float32, seed=0):
    """On the CPU, not sharded."""
    model = build(config, max_length=256, loss_chunk=7, dtype=dtype)
    materialize(model, config, device=torch.device("cpu"), seed=seed)
    return model


class MadeUpStream:
    """Sequences with the document lengths that a test asks for, and random bytes; stands in for a PackedStream."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.sequence_length = sum(lengths[0])

    def sequence(self, index):
        random = np.random.default_rng(index)
        lengths = self.lengths[index % len(self.lengths)]
        return assemble([random.integers(0, 258, n) for n in lengths])

    def fingerprint(self):
        return repr(self.lengths)
