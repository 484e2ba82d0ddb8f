"""The `model` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fm_longctx.train.config.check import above_zero, at_least

# rope_type -> the further fields that it needs, and those that it may have.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama or a dense Qwen3, in the names of its Hugging Face config; or any local Hugging Face folder."""

    kind: Literal["llama", "qwen3"] = "llama"
    """qwen3: queries and keys are normalised, head by head, before the rotation."""
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
    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    """How the rotary frequencies are stretched to longer documents than the weights were trained on. The rope_ fields
    below are those of Hugging Face's rope_parameters, and go into the model's own config."""
    rope_factor: float | None = None
    """How many times longer; at least 1. Needed by linear, yarn and llama3."""
    rope_original_max_position_embeddings: int | None = None
    """The length that the weights were trained on. Needed by yarn and llama3."""
    rope_low_freq_factor: float | None = None
    """llama3: frequencies with fewer turns than this within the original length are stretched wholly."""
    rope_high_freq_factor: float | None = None
    """llama3: those with more turns than this are left alone; above rope_low_freq_factor."""
    rope_beta_fast: float | None = None
    """yarn: frequencies with more turns than this are left alone. None: 32."""
    rope_beta_slow: float | None = None
    """yarn: those with fewer turns than this are stretched wholly. None: 1."""
    rope_attention_factor: float | None = None
    """yarn: multiplies queries and keys. None: 0.1 ln(rope_factor) + 1."""
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
        self._check_rope()

    def _check_rope(self) -> None:
        names = {name for needed, possible in ROPE_FIELDS.values() for name in (*needed, *possible)}
        given = {name for name in names if getattr(self, f"rope_{name}") is not None}
        needed, possible = ROPE_FIELDS[self.rope_type]
        missing, unused = sorted(set(needed) - given), sorted(given - {*needed, *possible})
        if missing:
            raise ValueError(
                f"model.rope_type: {self.rope_type} needs {', '.join(f'model.rope_{name}' for name in missing)}, as in "
                "rope_parameters of the Hugging Face config."
            )
        if unused:
            raise ValueError(
                f"{', '.join(f'model.rope_{name}' for name in unused)} would have no effect with model.rope_type: "
                f"{self.rope_type}. Leave it out, or set model.rope_type."
            )
        at_least(
            "model",
            1,
            rope_factor=self.rope_factor,
            rope_original_max_position_embeddings=self.rope_original_max_position_embeddings,
        )
        for name in sorted(given - {"factor", "original_max_position_embeddings"}):
            above_zero("model", **{f"rope_{name}": getattr(self, f"rope_{name}")})
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"model.rope_low_freq_factor must be below model.rope_high_freq_factor, got {low}, {high}."
            )

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """As a Hugging Face config has them."""
        needed, possible = ROPE_FIELDS[self.rope_type]
        given = {name: getattr(self, f"rope_{name}") for name in (*needed, *possible)}
        given = {name: value for name, value in given.items() if value is not None}
        return {"rope_type": self.rope_type, "rope_theta": self.rope_theta, **given}
