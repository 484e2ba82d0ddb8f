"""Memory of a training step, as a function of shapes. docs/memory.md explains the formulas and compares them.

Sizes are bytes of one rank. In formulas: T tokens of the rank (all sequences of its micro-batch), C hidden size, I the
MLP's width, Q = heads x head_dim, K = key/value heads x head_dim, H heads, V vocabulary; e is 2 bytes where the model
computes in bfloat16, else 4. The layers are the Llama layers of Hugging Face transformers, run as they are written or
with what surrounds attention compiled, under FSDP2.
"""

from __future__ import annotations

from dataclasses import dataclass

from fm_longctx.train.estimate import Setup, Shape


def norm_saved(width: int, heads: int, setup: Setup) -> int:
    """What RMSNorm over `heads` vectors that together are `width` wide keeps: its input in float32, the inverse root
    mean squares, and the normalised values in the model's dtype. Compiled: its input as it is, and the inverse roots.
    """
    values = setup.element if setup.compile else 4 + setup.element
    return setup.tokens * (values * width + 4 * heads)


def mlp_saved(shape: Shape, setup: Setup) -> int:
    """Gate, its SiLU, up, and their product: 4 e I a token; compiled 3, without the SiLU. Chunked: nothing that is not
    kept already."""
    wide = 3 if setup.compile else 4
    return 0 if setup.mlp_chunk is not None else wide * setup.element * shape.intermediate * setup.tokens


def received_keys(shape: Shape, setup: Setup) -> int:
    """Keys and values of other ranks, for one layer."""
    return round(2 * setup.element * shape.kv * setup.received)


def layer_saved(shape: Shape, setup: Setup) -> int:
    """What one layer keeps for its backward without checkpoints.

    Two norms and their outputs, 2 (4 + 2e) C + 8, or compiled 4 e C + 8, the layer's input among them; queries, keys,
    values and attention's output, e (2 Q + 2 K); LSE, 4 H; the MLP; received keys. A normalised query or key adds
    (4 + e) of its width, compiled e, and 4 a head.
    """
    t, e = setup.tokens, setup.element
    saved = 2 * (norm_saved(shape.hidden, 1, setup) + e * shape.hidden * t)
    if shape.qk_norm:
        saved += norm_saved(shape.q, shape.heads, setup) + norm_saved(shape.kv, shape.kv_heads, setup)
    saved += t * (e * (2 * shape.q + 2 * shape.kv) + 4 * shape.heads)
    return saved + mlp_saved(shape, setup) + received_keys(shape, setup)


def layer_kept(shape: Shape, setup: Setup) -> int:
    """What is kept of one layer from its forward to its backward, wherever that is; `mlp_extra` apart."""
    if setup.checkpointing == "none":
        return layer_saved(shape, setup)
    kept = setup.element * shape.hidden * setup.tokens
    if setup.checkpointing == "selective":
        kept += setup.tokens * (setup.element * shape.q + 4 * shape.heads) + received_keys(shape, setup)
    return kept


def mlp_extra(shape: Shape, setup: Setup) -> int:
    """What a layer of `mlp_kept` keeps besides: the MLP's input and what the MLP saves."""
    return setup.element * shape.hidden * setup.tokens + mlp_saved(shape, setup)


def within_layer(shape: Shape, setup: Setup, *, mlp_kept: bool = False) -> int:
    """Most that a layer's backward has beyond what was kept: recomputed activations, and what passes through.

    The largest of three moments. In the MLP: everything saved, the incoming gradient (e C) and two gradients of width I
    (compiled one; chunked: of one chunk, 6 e I with what it saves, compiled 4, and the weights' gradients in float32).
    In the norm after attention: all but the MLP, three float32 gradients of C and the residual's, while two saved
    values of e have gone; compiled three gradients of e, while one value has gone. In attention: all but MLP and that
    norm, the gradients of the residual, output, q, k and v, and sums in float32: of each row, of q, and over context
    ranks of q, k and v. The matrices' own gradients join as they are made.

    Args:
        mlp_kept: the layer is one of those: its MLP's part is kept and goes before the rest is computed again.
    """
    t, e, c = setup.tokens, setup.element, shape.hidden
    mlp, norm = mlp_saved(shape, setup), norm_saved(c, 1, setup) + e * c * t
    weights = 3 * c * shape.intermediate
    trained = e if setup.trained is None else 0
    if setup.mlp_chunk is None:
        in_mlp = t * e * (c + (1 if setup.compile else 2) * shape.intermediate) + trained * weights // 3
    else:
        rows = min(t, setup.mlp_chunk)
        sums = (4 + e) * weights if trained else 0
        in_mlp = 2 * t * e * c + (4 if setup.compile else 6) * rows * e * shape.intermediate + sums
    in_norm = t * c * (2 * e if setup.compile else 3 * 4 - e) + trained * weights
    sums = 4 * (shape.heads + shape.q)
    sums += 4 * (shape.q + 2 * shape.kv) if setup.over_ranks else 0
    in_attention = t * (e * (c + 2 * shape.q + 2 * shape.kv) + sums) - norm + trained * (weights + c * shape.q)
    if setup.checkpointing == "none":
        # Freed as it goes, and counted as kept.
        return max(in_mlp, in_norm - mlp, in_attention - mlp, 0)
    again = layer_saved(shape, setup) - mlp
    if setup.compile:
        # The layer's input, which the first norm saves as it is, is there.
        again -= e * c * t
    if setup.checkpointing == "selective":
        # Kept, so not made again.
        again -= t * (e * shape.q + 4 * shape.heads) + received_keys(shape, setup)
    if mlp_kept:
        return max(in_mlp, again + max(in_norm, in_attention) - mlp_extra(shape, setup))
    return again + max(mlp + in_mlp, in_norm, in_attention)


def last_norm(shape: Shape, setup: Setup) -> int:
    """What the last norm keeps: its input, or without checkpoints what a norm keeps."""
    if setup.checkpointing == "none":
        return norm_saved(shape.hidden, 1, setup)
    return setup.element * shape.hidden * setup.tokens


def loss_kept(shape: Shape, setup: Setup) -> int:
    """From the loss to its backward: the gradients of hidden states, e C T, and of the projection, 4 V C."""
    projection = 4 * shape.vocabulary * shape.hidden if shape.head and setup.trained is None else 0
    return setup.element * shape.hidden * setup.tokens + projection


def loss_passing(shape: Shape, setup: Setup) -> int:
    """While the loss runs, besides: the hidden states, and one chunk's logits twice in float32."""
    logits = min(setup.tokens, setup.loss_chunk) * shape.vocabulary * 8 if shape.head else 0
    return setup.element * shape.hidden * setup.tokens + logits


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank by kind, and the most that exist at once."""

    parameters: int
    """Its shard of the weights; those that are frozen in the dtype that they compute in."""
    reference: int
    """Its shard of a frozen copy."""
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
    """Bytes by kind, and the peak over the moments of a step.

    Tensors only: the CUDA context and what the allocator cannot use come on top.
    """
    e, ranks, layers = setup.element, setup.ranks, shape.layers
    trained = shape.parameters if setup.trained is None else setup.trained // setup.tensor
    gradients = -(-trained * setup.master // ranks)
    weights = gradients if setup.trained is None else gradients + -(-shape.parameters * e // ranks)
    reference = -(-shape.parameters * e // ranks) if setup.reference == "copy" else 0
    per_layer = shape.layer_parameters if setup.trained is None else setup.trained // setup.tensor // layers
    outside = shape.root_parameters if setup.trained is None else 0
    gathered_root = 0 if setup.whole else e * shape.root_parameters
    gathered_layer = 0 if setup.whole else e * shape.layer_parameters
    reduced_root = 0 if setup.whole else (e + 4) * outside
    head = e * shape.vocabulary * shape.hidden if shape.head and setup.trained is None else 0
    kept, received = layer_kept(shape, setup), received_keys(shape, setup)
    if setup.checkpointing == "full":
        received = 0
    extra = mlp_extra(shape, setup) if setup.mlp_kept else 0
    before = gradients if setup.accumulation > 1 else 0

    def kept_up_to(layer: int) -> int:
        """On the device, of this layer and those before it."""
        here = layer + 1
        if setup.offload:
            # The layer's own, less its input where only the recomputation reads it; the one before is on its way.
            here, gone = min(2, here), 0 if setup.compile else e * shape.hidden * setup.tokens
            return here * kept - gone
        return here * kept + max(0, layer + 1 - (layers - setup.mlp_kept)) * extra

    def backward(layer: int) -> int:
        """The most in this layer's backward, without what exists throughout."""
        ahead = min(1, layer)  # The layer before is gathered while this one computes.
        after = layers - 1 - layer
        # Those of the layer after it travel while this one's are made.
        reducing = 4 * per_layer if after and not setup.whole else 0
        shards = before or after * per_layer * setup.master // ranks
        inside = within_layer(shape, setup, mlp_kept=layer >= layers - setup.mlp_kept)
        whole = gathered_root + (1 + ahead) * gathered_layer
        return whole + head + reducing + shards + kept_up_to(layer) + inside

    loss = loss_kept(shape, setup) + loss_passing(shape, setup) + last_norm(shape, setup)
    moments = {
        "the loss": gathered_root + kept_up_to(layers - 1) + loss + before,
        "the last layer's backward": backward(layers - 1),
        "the first layer's backward": backward(0),
        "the reduction of the embedding's gradient": gathered_root + reduced_root + gradients,
        "the optimizer's step": gradients,
    }
    for layer in range(1, layers - 1):
        moments[f"the backward of layer {layer} of {layers}"] = backward(layer)
    moment = max(moments, key=lambda name: moments[name])
    everything, inner = kept_up_to(layers - 1), min(2, layers) if setup.offload else layers
    return Memory(
        parameters=weights,
        reference=reference,
        gradients=gradients,
        optimizer=2 * gradients,
        gathered=gathered_root + 2 * gathered_layer,
        unreduced=0 if setup.whole else (e + 4) * per_layer + head,
        activations=everything - inner * received,
        received=inner * received,
        within_layer=within_layer(shape, setup, mlp_kept=setup.mlp_kept == layers),
        loss=loss,
        host=layers * kept if setup.offload else 0,
        peak=weights + reference + 2 * gradients + moments[moment],
        moment=moment,
    )
