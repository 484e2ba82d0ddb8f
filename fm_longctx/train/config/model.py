"""The `model` section."""

from __future__ import annotations

from dataclasses import dataclass

from fm_longctx.train.config.check import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama, in the names of its Hugging Face config; or any local Hugging Face folder."""

    path: str | None = None
    """A local folder with config.json and safetensors: its weights are the start, and the shape below is ignored."""
    vocab_size: int = 258
    """Rows of the embedding; at least the tokenizer's (258 for bytes)."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 384
    """Width inside the MLP."""
    num_hidden_layers: int = 4
    """Decoder layers."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads; they divide the query heads."""
    head_dim: int = 32
    """Size of one head; even."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output projection too."""
    initializer_range: float = 0.02
    """Standard deviation of every initial matrix. Norm weights start at 1."""

    def __post_init__(self) -> None:
        at_least(
            "model",
            1,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )
        above_zero(
            "model",
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_key_value_heads must divide model.num_attention_heads, got {self.num_key_value_heads} and "
                f"{self.num_attention_heads}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads must divide model.hidden_size (transformers asks for it), got "
                f"{self.num_attention_heads} and {self.hidden_size}."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary positions, got {self.head_dim}.")
