"""Memory and FLOPs of a training step, as functions of shapes. docs/memory.md explains the formulas.

Sizes are bytes of one rank. In formulas: T tokens of the rank (all sequences of its micro-batch), C hidden size, I the
MLP's width, Q = heads x head_dim, K = key/value heads x head_dim, H heads, V vocabulary; e is 2 bytes where the model
computes in bfloat16, else 4. The layers are the Llama layers of Hugging Face transformers, run as they are written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

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
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

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
    loss_chunk: int = 1024
    received: float = 0.0
    """Keys of other context ranks that a layer of this rank receives, over all stages, in tokens."""
    over_ranks: bool = False
    """Attention is context parallel: it adds up query gradients in float32."""
    accumulation: int = 1
    """Micro-batches in a step."""
    tensor: int = 1
    """Tensor ranks; the shape is then one's part, `Shape.over`."""

    @property
    def element(self) -> int:
        """e: bytes of an activation, and of a weight while it computes."""
        return 4 if self.precision == "float32" else 2

    @property
    def master(self) -> int:
        """Bytes of a weight, of a gradient and of each of Adam's moments where they are kept."""
        return 2 if self.precision == "bfloat16_stochastic" else 4


def norm_saved(width: int, heads: int, setup: Setup) -> int:
    """What RMSNorm over `heads` vectors that together are `width` wide keeps: its input in float32, the inverse root
    mean squares, and the normalised values in the model's dtype."""
    return setup.tokens * ((4 + setup.element) * width + 4 * heads)


def mlp_saved(shape: Shape, setup: Setup) -> int:
    """Gate, its SiLU, up, and their product: 4 e I a token. Chunked: nothing that is not kept already."""
    return 0 if setup.mlp_chunk is not None else 4 * setup.element * shape.intermediate * setup.tokens


def received_keys(shape: Shape, setup: Setup) -> int:
    """Keys and values of other ranks, for one layer."""
    return round(2 * setup.element * shape.kv * setup.received)


def layer_saved(shape: Shape, setup: Setup) -> int:
    """What one layer keeps for its backward without checkpoints.

    Two norms and their outputs, 2 (4 + 2e) C + 8; queries, keys, values and attention's output, e (2 Q + 2 K); LSE,
    4 H; the MLP; received keys. A normalised query or key adds (4 + e) of its width and 4 a head.
    """
    t, e = setup.tokens, setup.element
    saved = 2 * (norm_saved(shape.hidden, 1, setup) + e * shape.hidden * t)
    if shape.qk_norm:
        saved += norm_saved(shape.q, shape.heads, setup) + norm_saved(shape.kv, shape.kv_heads, setup)
    saved += t * (e * (2 * shape.q + 2 * shape.kv) + 4 * shape.heads)
    return saved + mlp_saved(shape, setup) + received_keys(shape, setup)


def layer_kept(shape: Shape, setup: Setup) -> int:
    """What is kept of one layer from its forward to its backward, wherever that is."""
    if setup.checkpointing == "none":
        return layer_saved(shape, setup)
    kept = setup.element * shape.hidden * setup.tokens
    if setup.checkpointing == "selective":
        kept += setup.tokens * (setup.element * shape.q + 4 * shape.heads) + received_keys(shape, setup)
    return kept


def within_layer(shape: Shape, setup: Setup) -> int:
    """Most that a layer's backward has beyond what was kept: recomputed activations, and what passes through.

    The largest of three moments. In the MLP: everything saved, the incoming gradient (e C) and two gradients of width I
    (chunked: of one chunk, 6 e I with what it saves, and the weights' gradients in float32). In the norm after
    attention: all but the MLP, three float32 gradients of C and the residual's, while two saved values of e have gone.
    In attention: all but MLP and that norm, the gradients of the residual, output, q, k and v, and float32 sums of q's;
    over context ranks twice these, and float32 gradients of k and v.
    """
    t, e, c = setup.tokens, setup.element, shape.hidden
    saved = layer_saved(shape, setup)
    recomputed = 0 if setup.checkpointing == "none" else saved
    mlp = mlp_saved(shape, setup)
    norm = norm_saved(c, 1, setup) + e * c * t
    if setup.mlp_chunk is None:
        in_mlp = t * e * (c + 2 * shape.intermediate)
    else:
        rows, weights = min(t, setup.mlp_chunk), 3 * c * shape.intermediate
        in_mlp = 2 * t * e * c + 6 * rows * e * shape.intermediate + (4 + e) * weights
    in_norm = t * c * (3 * 4 - e) - mlp
    sums = 4 * (shape.heads + shape.q) + (4 * (shape.q + 2 * shape.kv) if setup.over_ranks else 0)
    in_attention = t * (e * (c + 2 * shape.q + 2 * shape.kv) + sums) - mlp - norm
    if setup.checkpointing == "selective":
        # Kept, so not made again.
        recomputed -= setup.tokens * (e * shape.q + 4 * shape.heads) + received_keys(shape, setup)
    elif setup.checkpointing == "none":
        # Freed as it goes, and counted as kept.
        return max(in_mlp, in_norm, in_attention, 0)
    return recomputed + max(in_mlp, in_norm, in_attention)


def last_norm(shape: Shape, setup: Setup) -> int:
    """What the last norm keeps: its input, or without checkpoints what a norm keeps."""
    if setup.checkpointing == "none":
        return norm_saved(shape.hidden, 1, setup)
    return setup.element * shape.hidden * setup.tokens


def loss_kept(shape: Shape, setup: Setup) -> int:
    """From the loss to its backward: the gradients of hidden states, e C T, and of the projection, 4 V C."""
    return setup.element * shape.hidden * setup.tokens + 4 * shape.vocabulary * shape.hidden


def loss_passing(shape: Shape, setup: Setup) -> int:
    """While the loss runs, besides: the hidden states, one chunk's logits twice in float32 and once in e, and one
    chunk's gradient of the projection."""
    logits = min(setup.tokens, setup.loss_chunk) * shape.vocabulary * (8 + setup.element)
    return setup.element * shape.hidden * setup.tokens + logits + 4 * shape.vocabulary * shape.hidden


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank by kind, and the most that exist at once."""

    parameters: int
    """Its shard of the weights."""
    gradients: int
    """Its shard of the gradients."""
    optimizer: int
    """Its shard of Adam's moments."""
    gathered: int
    """Whole weights while they compute: embedding and projection throughout, two layers."""
    unreduced: int
    """Whole gradients of a layer and of the projection, and a layer's in float32 for the reduction."""
    activations: int
    """Kept of all layers, on the device; received keys are apart."""
    received: int
    """Keys of other ranks, kept of all layers, on the device."""
    within_layer: int
    """Passing through, in one layer's backward."""
    loss: int
    """Kept and passing through, while the loss runs."""
    host: int
    """Offloaded, in the host's memory."""
    peak: int
    """The most at once, on the device."""
    moment: str
    """When that is."""


def memory(shape: Shape, setup: Setup) -> Memory:
    """Bytes by kind, and the peak over five moments of a step.

    Tensors only: the CUDA context and what the allocator cannot use come on top.
    """
    e, ranks, layers = setup.element, setup.ranks, shape.layers
    weights = -(-shape.parameters * setup.master // ranks)
    gathered_root = e * shape.root_parameters
    gathered = gathered_root + 2 * e * shape.layer_parameters
    head = e * shape.vocabulary * shape.hidden
    # Two reductions overlap: the next layer's gradients are made while these travel.
    reducing = (e + 4) * shape.layer_parameters + 4 * shape.layer_parameters // ranks
    kept, received = layer_kept(shape, setup), received_keys(shape, setup)
    if setup.checkpointing == "full":
        received = 0
    here = min(2, layers) if setup.offload else layers
    activations, on_host = here * kept, layers * kept if setup.offload else 0
    inside = within_layer(shape, setup)
    loss = loss_kept(shape, setup) + loss_passing(shape, setup) + last_norm(shape, setup)
    # Hidden states' gradients and the projection's are still there in the last layer's backward.
    backward = inside + reducing + head
    before = weights if setup.accumulation > 1 else 0
    moments = {
        "the loss": gathered_root + activations + loss + before,
        "the last layer's backward": gathered + activations + backward + before,
        "the first layer's backward": gathered + min(activations, 2 * kept) + backward + weights,
        "the reduction of the projection's gradient": gathered_root
        + (e + 4) * shape.root_parameters
        + 4 * shape.root_parameters // ranks
        + weights,
        "the optimizer's step": gathered_root + weights,
    }
    moment = max(moments, key=lambda name: moments[name])
    return Memory(
        parameters=weights,
        gradients=weights,
        optimizer=2 * weights,
        gathered=gathered,
        unreduced=reducing + head,
        activations=activations - here * received,
        received=here * received,
        within_layer=inside,
        loss=loss,
        host=on_host,
        peak=3 * weights + moments[moment],
        moment=moment,
    )


def forward_flops(shape: Shape, tokens: float, area: float) -> float:
    """2 a weight and token, 4 D a visible score and head: all layers and the output projection.

    Args:
        area: visible scores of one head, over all sequences of the tokens.
    """
    weights = shape.layers * shape.layer_matrices + shape.vocabulary * shape.hidden
    return 2.0 * weights * tokens + 4.0 * shape.q * shape.layers * area


def step_flops(shape: Shape, tokens: float, area: float) -> float:
    """What a training step is credited with: three forwards, and nothing for what is computed twice."""
    return 3.0 * forward_flops(shape, tokens, area)
