"""What a step computes, by the masks' real area, and what a GPU could: from these come TFLOP/s and MFU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fm_longctx.data import Batch
from fm_longctx.mask import builders

# Dense bfloat16 with float32 accumulation, TFLOP/s, from the makers' data sheets. The first name found in the GPU's
# own counts, so the longer names come first.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Forward and backward of a dense decoder: the backward counts twice the forward, recomputation never.

    Each token meets every weight of every matrix once (2 FLOPs), the embedding's lookup none. Each visible score costs
    2 D for its product and 2 D_v for the value it weighs, in each query head and layer. Norms, rotary angles, the
    softmax and the activation function are not counted, as is usual.
    """

    matrix_parameters: int
    """Weights that a token is multiplied with; the output projection's among them, tied or not."""
    score_flops: int
    """2 (D + D_v) x query heads: the forward of one visible score in one layer."""
    layers: tuple[int | None, ...]
    """The sliding window of each attention layer; None where it has none."""

    @classmethod
    def of(cls, causal_lm: nn.Module, hf_config: Any) -> FlopCount:
        """Counted from a model (on the meta device will do) and its Hugging Face config."""
        heads = hf_config.num_attention_heads
        width = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        value_width = getattr(hf_config, "v_head_dim", None) or width
        layers = hf_config.num_hidden_layers
        kinds: Sequence[str] = getattr(hf_config, "layer_types", None) or ["full_attention"] * layers
        return cls(
            matrix_parameters=sum(m.weight.numel() for m in causal_lm.modules() if isinstance(m, nn.Linear)),
            score_flops=2 * (width + value_width) * heads,
            layers=tuple(hf_config.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        )

    def forward(self, tokens: float, areas: Mapping[int | None, float]) -> float:
        """FLOPs of a forward: 2 a weight and token, and the scores'.

        Args:
            areas: visible scores of one head, over all sequences of the tokens, by sliding window.
        """
        scores = sum(self.score_flops * areas[window] for window in self.layers)
        return 2.0 * self.matrix_parameters * tokens + scores

    def step(self, tokens: float, areas: Mapping[int | None, float]) -> float:
        """What training is credited with: three forwards, and nothing for what is computed twice."""
        return 3.0 * self.forward(tokens, areas)

    def of_batch(self, batch: Batch) -> float:
        """FLOPs of a micro-batch, over all the ranks that share it."""
        areas: dict[int | None, float] = {None: batch.visible_area}
        for window in set(self.layers) - {None}:
            assert window is not None
            narrow = batch.mask & builders.sliding_window(batch.mask.num_rows, window)
            areas[window] = int(narrow.area().sum())
        return self.step(batch.num_tokens, areas)


def peak_tflops(gpu: str | None, precision: str, given: float | None) -> float | None:
    """What MFU is a share of: the given peak, or else the named GPU's for bfloat16 work. None: there is no MFU."""
    if given is not None or gpu is None or precision != "bfloat16":
        return given
    return next((peak for name, peak in PEAK_TFLOPS.items() if name.lower() in gpu.lower()), None)
