"""How long a training step takes on a GPU: rates and bytes, beside the FLOPs of `estimate`. A model, not a measurement.

Every rate of a GPU says where it is from. docs/memory.md explains the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from fm_longctx.train.estimate import GIB, Setup, Shape, step_flops
from fm_longctx.train.estimate_memory import layer_kept

# What eager layers move, bytes a token and value in bfloat16, forward and backward: a norm moves its values a dozen
# times in 2 or 4 bytes, and 2.4 times that in its backward; the rotations; SiLU and product; the additions.
_FORWARD = {"norm": 38, "rotary": 20, "mlp": 10, "residual": 6}
_BACKWARD = {"norm": 90, "rotary": 30, "mlp": 18, "residual": 6}
# Compiled: each value is read and written once, and read again for each sum over a row.
_FORWARD_COMPILED = {"norm": 6, "rotary": 4, "mlp": 6, "residual": 6}
_BACKWARD_COMPILED = {"norm": 12, "rotary": 4, "mlp": 12, "residual": 6}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its maker describes it, and at what rates it is expected to work."""

    name: str
    memory: float
    """Bytes, as nvidia-smi shows them."""
    peak: float
    """Dense bf16 FLOP/s, the maker's figure; MFU is a share of it."""
    bandwidth: float
    """Bytes a second of its memory, the maker's figure."""
    attention_forward: float
    """FLOP/s of the attention kernels over the visible area."""
    attention_backward: float
    attention_source: str
    """Measured where, or assumed."""
    matmul: float = 0.7
    """Share of the peak that large matrix products reach: an assumption."""
    passes: float = 0.8
    """Share of the bandwidth that memory-bound passes reach: an assumption."""
    link: float = 4.5e10
    """Bytes a second between nodes, a GPU: one 400 Gb/s network card each, an assumption."""
    node_link: float = 3.0e11
    """Bytes a second within a node, a GPU; and of gathering and reducing over nodes, where the cards of a node's eight
    GPUs carry each byte once: an assumption."""
    host_link: float = 5.0e10
    """Bytes a second to the host: PCIe 5 x16, an assumption."""
    usable: float = 0.92
    """Share of the memory that tensors can have: the CUDA context, NCCL and gaps take the rest; an assumption."""

    def attention_rates(self, head_dim: int) -> tuple[float, float]:
        """FLOP/s of forward and backward. Below D 128 a tile has fewer products for each exponential."""
        forward, backward = (1.0, 1.0) if head_dim >= 128 else NARROW
        return forward * self.attention_forward, backward * self.attention_backward


_HOPPER = "measured on an H100: benchmarks/results/2026-11-26-attention.md, causal documents, D 128, N 32768"
# Of the rates at D 128, those at D 64 in the same rows.
NARROW = (0.75, 0.87)
GPUS = {
    gpu.name: gpu
    for gpu in (
        # Data sheets: nvidia.com, "NVIDIA H100 Tensor Core GPU", SXM; "NVIDIA H200 Tensor Core GPU", SXM.
        Gpu(
            name="h100",
            memory=81559 * 2**20,
            peak=989e12,
            bandwidth=3.35e12,
            attention_forward=534e12,
            attention_backward=471e12,
            attention_source=_HOPPER,
        ),
        Gpu(
            name="h200",
            memory=143771 * 2**20,
            peak=989e12,
            bandwidth=4.8e12,
            attention_forward=534e12,
            attention_backward=471e12,
            attention_source=_HOPPER,
        ),
        # Data sheet: "NVIDIA A100 Tensor Core GPU", 80GB SXM.
        Gpu(
            name="a100",
            memory=81920 * 2**20,
            peak=312e12,
            bandwidth=2.039e12,
            attention_forward=150e12,
            attention_backward=120e12,
            attention_source="assumed: about half of the peak",
            link=2.25e10,
            node_link=2.0e11,
            host_link=2.5e10,
        ),
        # Data sheet: "NVIDIA Blackwell Architecture", HGX B200, dense.
        Gpu(
            name="b200",
            memory=183359 * 2**20,
            peak=2250e12,
            bandwidth=8e12,
            attention_forward=700e12,
            attention_backward=550e12,
            attention_source="assumed: the portable kernels at a third of the peak",
            node_link=6.0e11,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the rank that has most to do."""

    matrices: float
    """Projections, MLP and loss, recomputation included."""
    attention: float
    """The kernels, recomputation included."""
    passes: float
    """What is bound by memory: norms, rotations, activations, residuals, the optimizer."""
    exchange: float
    """Waiting for keys and their gradients, beyond what attention hides."""
    tensor: float
    """Sums over tensor ranks, which nothing hides."""
    sharding: float
    """Waiting for weights and gradients of other ranks, beyond what all of that hides."""

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.passes + self.exchange + self.tensor + self.sharding


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Seconds of one layer's attention on its slowest rank, a micro-batch."""

    forward: float
    backward: float
    forward_wait: float = 0.0
    """Of exchanges that are not hidden; not part of `forward`."""
    backward_wait: float = 0.0


def attention_alone(shape: Shape, gpu: Gpu, area: float) -> Attention:
    """Where nothing is exchanged: 4 D FLOPs a visible score and head, and 2.5 times that in the backward."""
    flops = 4.0 * shape.q * area
    forward, backward = gpu.attention_rates(shape.head_dim)
    return Attention(forward=flops / forward, backward=2.5 * flops / backward)


def sharding_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes that a rank receives a step for sharded parameters: weights gathered in the forward and again in the
    backward of every micro-batch, and for a reference, gradients reduced once a micro-batch in float32."""
    away = (setup.ranks - 1) / setup.ranks
    trained = shape.parameters if setup.trained is None else setup.trained
    gathers = 2 if setup.reference == "none" else 3
    return setup.accumulation * away * (gathers * setup.element * shape.parameters + 4 * trained)


def step_time(shape: Shape, setup: Setup, gpu: Gpu, attention: Attention) -> StepTime:
    """The sum of what runs one after the other on a GPU.

    Args:
        attention: of one layer and micro-batch.
    """
    again = 0 if setup.checkpointing == "none" else 1
    extra = 0 if setup.reference == "none" else 1
    t, c, layers = setup.tokens, shape.hidden, shape.layers
    # Frozen weights have no gradient; a reference reads the batch once more.
    products = (3 if setup.trained is None else 2) + extra
    # A recomputation ends before the MLP's last product, or before a chunked MLP, which computes all but that again.
    layer = 2.0 * t * (products * shape.layer_matrices + again * (shape.layer_matrices - c * shape.intermediate))
    if setup.mlp_chunk is not None and not again:
        layer += 2.0 * t * 2 * c * shape.intermediate
    if setup.mlp_kept:
        layer -= 2.0 * t * 2 * c * shape.intermediate * setup.mlp_kept / layers
    head = products * 2.0 * t * shape.vocabulary * c * shape.head
    repeated = (1 if setup.checkpointing == "full" else 0) + extra
    widths = {"norm": 2 * c, "rotary": shape.q + shape.kv, "mlp": shape.intermediate, "residual": 2 * c}
    forward, backward = (_FORWARD_COMPILED, _BACKWARD_COMPILED) if setup.compile else (_FORWARD, _BACKWARD)
    passes = {name: (1 + again + extra) * forward[name] + backward[name] for name in widths}
    moved = layers * t * sum(widths[name] * passes[name] for name in widths) * setup.element / 2
    # Logits in float32, seven times a chunk, and the sum of the projection's gradients, twice.
    moved += shape.head * shape.vocabulary * (28.0 * t + 8.0 * c * -(-t // setup.loss_chunk))
    trained = shape.parameters if setup.trained is None else setup.trained
    # Adam's; and gathering, reducing and clipping, of whole weights and of a rank's.
    optimizer = 10.0 * setup.master * trained / setup.ranks
    weights = setup.accumulation * (4.0 * setup.element * shape.parameters + 8.0 * trained)
    matrices = setup.accumulation * (layers * layer + head) / (gpu.matmul * gpu.peak)
    kernels = setup.accumulation * layers * ((1 + repeated) * attention.forward + attention.backward)
    memory_bound = (setup.accumulation * moved + optimizer + weights) / (gpu.passes * gpu.bandwidth)
    exchange = setup.accumulation * layers * ((1 + repeated) * attention.forward_wait + attention.backward_wait)
    # After attention and the MLP, forward and backward: each rank sends and receives the hidden states twice.
    away = 2 * (setup.tensor - 1) / setup.tensor * setup.element * c * t
    tensor = setup.accumulation * layers * (4 + 2 * (again + extra)) * away / gpu.node_link
    hiding = matrices + kernels + memory_bound + exchange + tensor
    return StepTime(
        matrices=matrices,
        attention=kernels,
        passes=memory_bound,
        exchange=exchange,
        tensor=tensor,
        sharding=max(0.0, sharding_bytes(shape, setup) / gpu.node_link - hiding),
    )


def offload_seconds(shape: Shape, setup: Setup, gpu: Gpu) -> float:
    """Seconds that the host link works each way in a micro-batch. It hides where it is below the forward's."""
    return shape.layers * layer_kept(shape, setup) / gpu.host_link if setup.offload else 0.0


def mfu(shape: Shape, gpu: Gpu, *, tokens: float, area: float, gpus: int, seconds: float) -> float:
    """Three forwards over the real area, of what the GPUs could do in that time at their peak.

    Args:
        tokens, area: of the whole step, over all ranks; area is that of one head.
    """
    return step_flops(shape, tokens, area) / (gpus * gpu.peak * seconds)


def fits(peak: float, gpu: Gpu) -> bool:
    """Whether tensors that take so many bytes fit."""
    return peak <= gpu.usable * gpu.memory


__all__ = [
    "GIB",
    "GPUS",
    "NARROW",
    "Attention",
    "Gpu",
    "StepTime",
    "attention_alone",
    "fits",
    "mfu",
    "offload_seconds",
    "sharding_bytes",
    "step_time",
]
