"""Zigzag owners, windows and rotary angles against Megatron's own functions."""

import dataclasses

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.transformer.utils import get_sliding_window_causal_mask
from megatron.core.utils import get_batch_on_this_cp_rank

from fm_longctx import ContextParallel, ShardPlan
from fm_longctx.integrations.megatron import FlashMaskParams, use_position_ids
from fm_longctx.integrations.megatron.window import layer_window, window_mask
from fm_longctx.integrations.megatron.zigzag import zigzag_owners
from fm_longctx.mask import builders
from tests.integrations.megatron.cpu import megatron_on_cpu
from tests.integrations.megatron.world import thd_rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_zigzag_is_megatrons(world_size, monkeypatch):
    n = 2 * world_size * 7
    owners = zigzag_owners(torch.tensor([0, n]), world_size)
    bounds = torch.tensor([0, 2, 2, 3, 9]) * 2 * world_size
    of_documents = zigzag_owners(bounds, world_size)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        batch = get_batch_on_this_cp_rank({"tokens": torch.arange(n)[None]})
        assert (owners == rank).nonzero()[:, 0].equal(batch["tokens"][0])
        assert (of_documents == rank).nonzero()[:, 0].equal(thd_rows(bounds, world_size, rank))


def test_zigzag_lengths_that_do_not_fit():
    assert zigzag_owners(torch.tensor([0, 3, 7]), 1).equal(torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cuts the sequence into 2 x 2 equal chunks, which its length 10 does not"):
        zigzag_owners(torch.tensor([0, 10]), 2)
    with pytest.raises(ValueError, match=r"document 1, positions 4\.\.9, into 2 x 2 equal chunks"):
        zigzag_owners(torch.tensor([0, 4, 9]), 2)


@pytest.mark.parametrize("window", [(0, 0), (3, 0), (4, 2), (0, 5), (-1, 0), (2, -1), (-1, 3), (50, 50)])
def test_window_is_megatrons(window):
    n = 13
    unbounded = tuple(n if side == -1 else side for side in window)
    with megatron_on_cpu():
        masked = get_sliding_window_causal_mask(n, n, unbounded)
    assert window_mask(n, window).to_dense()[0, 0].equal(~masked)


def test_which_layers_have_the_window():
    @dataclasses.dataclass
    class Config:
        window_size: object
        window_attn_skip_freq: object = None

    assert layer_window(Config((7, 0)), 1) == (7, 0)
    assert [layer_window(Config((7, 0), 2), i) for i in (1, 2, 3)] == [(7, 0), None, (7, 0)]
    assert [layer_window(Config([7, 0], [0, 1]), i) for i in (1, 2)] == [None, (7, 0)]
    assert layer_window(Config(None), 1) is None and layer_window(Config((-1, -1)), 1) is None
    with pytest.raises(ValueError, match=r"window_size must be \(left, right\)"):
        window_mask(4, (-2, 0))


def some_params(positions, sharding="plan"):
    mask = builders.causal(positions.shape[-1])
    return FlashMaskParams(ContextParallel(None, ShardPlan.build(mask, 1)), position_ids=positions, sharding=sharding)


@dataclasses.dataclass
class RopeConfig:
    apply_rope_fusion: bool = False


@pytest.mark.parametrize("kind", ["plain", "interleaved", "interpolated", "llama 3", "part", "yarn"])
def test_angles_are_rows_of_megatrons_table(kind):
    options = {
        "plain": {},
        "interleaved": {"rotary_interleaved": True},
        "interpolated": {"seq_len_interpolation_factor": 3.0},
        "llama 3": {"rope_scaling": True},
        "part": {"rotary_percent": 0.5},
        "yarn": {"scaling_factor": 4.0, "original_max_position_embeddings": 64},
    }[kind]
    make = YarnRotaryEmbedding if kind == "yarn" else RotaryEmbedding
    positions = torch.tensor([[0, 1, 2, 700, 3, 9], [5, 5, 0, 1, 1, 2]])
    with megatron_on_cpu():
        rope = make(16, **{"rotary_percent": 1.0, "use_cpu_initialization": True} | options)
        model = torch.nn.ModuleDict({"rope": rope})
        assert use_position_ids(use_position_ids(model)) is model and model["rope"].rope is rope
        assert not model.state_dict()
        length = model["rope"].get_rotary_seq_len(None, None, None, RopeConfig(), some_params(positions))
        got, table = model["rope"](length, packed_seq=False, cp_group=None), rope.get_emb(1000)
        if kind == "yarn":
            (got, factor), (table, expected_factor) = got, table
            assert factor == expected_factor
        assert got.shape == (6, 2, 1, table.shape[-1])
        expected = table[positions.t()].squeeze(2)
        torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)
        # Other batches go on as before.
        torch.testing.assert_close(model["rope"](12), rope(12))
        assert model["rope"].inv_freq is rope.inv_freq


def test_positions_that_would_be_wrong():
    with megatron_on_cpu():
        rope = RotaryEmbedding(16, 1.0, use_cpu_initialization=True)
        params = some_params(torch.zeros(2, 6, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"Call use_position_ids\(model\)"):
            rope.get_rotary_seq_len(None, None, None, RopeConfig(), params)
        wrapped = use_position_ids(torch.nn.ModuleDict({"rope": rope}))["rope"]
        with pytest.raises(ValueError, match="apply_rope_fusion=True takes one row of positions"):
            wrapped.get_rotary_seq_len(None, None, None, RopeConfig(True), params)
        with pytest.raises(ValueError, match="MLA's fused RoPE counts positions itself"):
            wrapped.get_cached_cos_sin(params)
        zigzag = some_params(torch.zeros(1, 6), sharding="zigzag")
        zigzag.position_ids = None
        assert wrapped.get_rotary_seq_len(None, None, None, RopeConfig(), zigzag) == 6
        with pytest.raises(ValueError, match="mrope"):
            use_position_ids([torch.nn.ModuleDict({"rope": MultimodalRotaryEmbedding(16, 1.0)})])
