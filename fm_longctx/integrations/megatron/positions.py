"""RoPE that follows position ids instead of Megatron's zigzag sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from torch import Tensor, nn

from fm_longctx.integrations.megatron.params import FlashMaskParams

Model = TypeVar("Model", nn.Module, Sequence[nn.Module])


def use_position_ids(model: Model) -> Model:
    """Make a model's RoPE use the positions in `FlashMaskParams`; call it once, after the model is built.

    GPT and MLA layers, RoPE and YaRN, on every pipeline stage. Batches with other parameters (or none) go on as before.
    Nothing of a checkpoint changes.

    Args:
        model: a Megatron model, wrapped or not, or a list of its chunks.

    Returns:
        the same model.

    Raises:
        ValueError: multimodal RoPE, whose three position ids a token are cut zigzag inside Megatron.
    """
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for module in list(chunk.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, MultimodalRotaryEmbedding):
                    raise ValueError(
                        'position_embedding_type="mrope" is cut zigzag inside Megatron and cannot follow a plan. Use '
                        'sharding="zigzag", which leaves positions to Megatron.'
                    )
                if isinstance(child, RotaryEmbedding) and not isinstance(module, PositionRotaryEmbedding):
                    setattr(module, name, PositionRotaryEmbedding(child))
    return model


class PositionRotaryEmbedding(nn.Module):
    """Stands where a `RotaryEmbedding` was and calls it, except for `FlashMaskParams` that bring positions.

    Megatron first asks for the length and then for the angles up to that length. Handing the parameters themselves out
    as the length carries the positions from one call to the other.
    """

    def __init__(self, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.rope = rope

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rope"), name)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> int | FlashMaskParams:
        if isinstance(packed_seq_params, FlashMaskParams) and packed_seq_params.position_ids is not None:
            if transformer_config.apply_rope_fusion and packed_seq_params.position_ids.shape[0] > 1:
                raise ValueError(
                    "apply_rope_fusion=True takes one row of positions for the whole micro-batch, got "
                    f"{packed_seq_params.position_ids.shape[0]}. Set it to False (--no-rope-fusion), or the "
                    "micro-batch size to 1."
                )
            return packed_seq_params
        length: int = self.rope.get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params, **kwargs
        )
        return length

    def forward(self, max_seq_len: int | FlashMaskParams, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, float]:
        """Angles `[T, 1 or B, 1, D]`, and YaRN's concentration factor with YaRN."""
        if not isinstance(max_seq_len, FlashMaskParams):
            angles: Tensor | tuple[Tensor, float] = self.rope(max_seq_len, *args, **kwargs)
            return angles
        positions = max_seq_len.position_ids
        assert positions is not None
        # Angles are proportional to the position, and row 1 of the table is position 1.
        if isinstance(self.rope, YarnRotaryEmbedding):
            table, concentration = self.rope.get_emb(2)
            return _angles(positions, table), concentration
        return _angles(positions, self.rope.get_emb(2))

    def get_cached_cos_sin(self, seq_len: int | FlashMaskParams, *args: Any, **kwargs: Any) -> Any:
        """Used by MLA with fused RoPE only."""
        if isinstance(seq_len, FlashMaskParams):
            raise ValueError(
                "MLA's fused RoPE counts positions itself and cannot follow a plan. Set apply_rope_fusion=False "
                "(--no-rope-fusion)."
            )
        return self.rope.get_cached_cos_sin(seq_len, *args, **kwargs)


def _angles(positions: Tensor, table: Tensor) -> Tensor:
    unit = table[1].flatten()
    return positions.t()[:, :, None, None].to(unit) * unit
