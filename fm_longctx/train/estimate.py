"""What estimates of a training step start from: a model's shape, how a rank trains it, and the FLOPs of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fm_longctx.train.flops import FlopCount

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model the formulas need."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """One matrix is embedding and output projection."""
    head: bool = True
    """It has an output projection over the vocabulary, as a reward model has not."""
    qk_norm: bool = False
    """Queries and keys are normalised, as in Qwen3."""

    @classmethod
    def of(cls, hf_config: Any) -> Shape:
        """The shape of a Hugging Face config of a dense decoder."""
        heads = hf_config.num_attention_heads
        return cls(
            hidden=hf_config.hidden_size,
            intermediate=hf_config.intermediate_size,
            layers=hf_config.num_hidden_layers,
            heads=heads,
            kv_heads=hf_config.num_key_value_heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            vocabulary=hf_config.vocab_size,
            tied=hf_config.tie_word_embeddings,
            qk_norm=hf_config.model_type == "qwen3",
        )

    def over(self, tensor: int) -> Shape:
        """The part of one of so many tensor ranks."""
        if tensor == 1:
            return self
        parts = {name: getattr(self, name) // tensor for name in ("intermediate", "heads", "kv_heads", "vocabulary")}
        return replace(self, **parts)

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of a layer's matrices."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.intermediate)

    @property
    def layer_parameters(self) -> int:
        return self.layer_matrices + 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def root_parameters(self) -> int:
        """Those outside the layers: embedding, output projection, last norm."""
        return self.vocabulary * self.hidden * (2 if self.head and not self.tied else 1) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.root_parameters


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How one rank trains it."""

    tokens: int
    """T."""
    ranks: int = 1
    """Ranks that the parameters are sharded over."""
    precision: Literal["float32", "bfloat16", "bfloat16_stochastic"] = "bfloat16"
    checkpointing: Literal["none", "full", "selective"] = "none"
    offload: bool = False
    mlp_chunk: int | None = None
    mlp_kept: int = 0
    """Layers, the last ones, whose MLP is not recomputed."""
    compile: bool = False
    loss_chunk: int = 4096
    received: float = 0.0
    """Keys of other context ranks that a layer of this rank receives, over all stages, in tokens."""
    over_ranks: bool = False
    """Attention is context parallel: it adds up query gradients in float32."""
    accumulation: int = 1
    """Micro-batches in a step."""
    tensor: int = 1
    """Tensor ranks; the shape is then one's part, `Shape.over`."""
    trained: int | None = None
    """Weights that train beside frozen ones, adapters and the like, of the whole model; None: all."""
    replicas: int = 1
    """Groups of such ranks, of HSDP."""
    reference: Literal["none", "copy", "same"] = "none"
    """What reads every batch once more without training, as DPO compares with: a frozen copy of the model, or the same
    one without its adapters."""

    @property
    def element(self) -> int:
        """e: bytes of an activation, and of a weight while it computes."""
        return 4 if self.precision == "float32" else 2

    @property
    def whole(self) -> bool:
        """Weights are kept as they compute, and no other rank has a part of them: nothing is gathered or reduced."""
        return self.precision == "bfloat16_stochastic" and self.ranks * self.replicas * self.tensor == 1

    @property
    def master(self) -> int:
        """Bytes of a weight, of a gradient and of each of Adam's moments where they are kept."""
        return 2 if self.precision == "bfloat16_stochastic" else 4


def flop_count(shape: Shape) -> FlopCount:
    """The count of a shape without sliding layers, as `FlopCount.of` makes it of a model."""
    return FlopCount(
        matrix_parameters=shape.layers * shape.layer_matrices + shape.head * shape.vocabulary * shape.hidden,
        score_flops=4 * shape.q,
        layers=(None,) * shape.layers,
    )


def step_flops(shape: Shape, tokens: float, area: float) -> float:
    """What a training step is credited with; `area` is of one head, over all sequences of the tokens."""
    return flop_count(shape).step(tokens, {None: area})
