"""The model: packed equals separate, a start that no mesh changes, weights from a folder, big shapes on meta."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from fm_longctx import ContextParallel, FlashMask, ShardPlan
from fm_longctx.train import engines
from fm_longctx.train.config import Config, ModelConfig, ParallelConfig, TrainConfig
from fm_longctx.train.config_load import load
from fm_longctx.train.model import build
from tests.distributed import run_ranks
from tests.train.tiny import CONFIG, MadeUpStream, tiny_model

ROOT = Path(__file__).parents[2]
PAIR = [37, 26]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_and_gradients(model, packed, **mask):
    model.zero_grad()
    loss = model(packed.tokens[None], packed.labels[None], packed.positions[None], **mask)
    loss.backward()
    return float(loss.detach()), gradients(model)


def separate():
    """Loss and gradients of the two documents, each alone in the model, added."""
    model = tiny_model()
    both = MadeUpStream([PAIR]).sequence(0)
    total, summed = 0.0, {}
    for document in (slice(0, 37), slice(37, 63)):
        tokens = both.tokens[document]
        n = len(tokens)
        labels = torch.cat([tokens[1:], torch.tensor([-100])])
        model.zero_grad()
        loss = model(tokens[None], labels[None], torch.arange(n)[None], flashmask=FlashMask.from_lengths([n]))
        loss.backward()
        total += float(loss.detach())
        for name, gradient in gradients(model).items():
            summed[name] = summed.get(name, 0) + gradient
    return total, summed


def assert_same(mine, exact, tolerance=2e-5):
    assert mine[0] == pytest.approx(exact[0], rel=tolerance)
    assert mine[1].keys() == exact[1].keys()
    for name, want in exact[1].items():
        assert (mine[1][name] - want).abs().max() <= tolerance * want.abs().max(), name


def test_packed_equals_separate():
    packed = MadeUpStream([PAIR]).sequence(0)
    assert_same(loss_and_gradients(tiny_model(), packed, flashmask=FlashMask.from_lengths(PAIR)), separate())


def packed_on_rank():
    packed = MadeUpStream([PAIR]).sequence(0)
    mask = FlashMask.from_lengths(PAIR)
    plan = ShardPlan.build(mask, dist.get_world_size(), chunk_size=8)
    context = ContextParallel(dist.group.WORLD, plan, mask)
    model = tiny_model()
    tokens, labels, positions = (
        plan.shard(x[None], dist.get_rank(), 1) for x in (packed.tokens, packed.labels, packed.positions)
    )
    loss = model(tokens, labels, positions, context=context)
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_packed_equals_separate_under_context_parallelism(world_size):
    ranks = run_ranks(world_size, packed_on_rank)
    summed = {name: sum(r[1][name] for r in ranks) for name in ranks[0][1]}
    assert_same((sum(r[0] for r in ranks), summed), separate())


def test_equals_hugging_face_with_a_dense_mask():
    """The same weights in plain transformers, dense mask from the words, whole logits."""
    model = tiny_model()
    packed = MadeUpStream([PAIR]).sequence(0)
    loss, mine = loss_and_gradients(model, packed, flashmask=FlashMask.from_lengths(PAIR))
    plain = AutoModelForCausalLM.from_config(model.causal_lm.config, attn_implementation="sdpa")
    plain.load_state_dict(model.causal_lm.state_dict())
    owner = [0] * 37 + [1] * 26
    visible = torch.tensor([[r >= c and owner[r] == owner[c] for c in range(63)] for r in range(63)])
    logits = plain(
        packed.tokens[None], attention_mask=visible[None, None], position_ids=packed.positions[None], use_cache=False
    ).logits
    exact = F.cross_entropy(logits[0].double(), packed.labels, reduction="sum")
    exact.backward()
    assert_same((loss, mine), (float(exact.detach()), {f"causal_lm.{n}": p.grad for n, p in plain.named_parameters()}))


def test_meta_build_has_the_buffers_of_a_plain_one():
    """to_empty leaves rotary frequencies as garbage: they must have been made anew."""
    model = tiny_model()
    plain = AutoModelForCausalLM.from_config(model.causal_lm.config)
    want = dict(plain.named_buffers())
    assert want
    for name, buffer in model.causal_lm.named_buffers():
        assert torch.equal(buffer, want.pop(name)), name
    assert not want


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotations_are_those_of_a_plain_model_and_are_exported(kind, rope, tmp_path):
    """Frequencies and YaRN's factor of attention, after a start on the meta device; logits, and the saved config."""
    settings = {f"rope_{name}": value for name, value in ROPES[rope].items()}
    model = tiny_model(replace(CONFIG, kind=kind, rope_type=rope, **settings))
    exported = model.causal_lm
    exported.config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == {
        "rope_type": rope,
        "rope_theta": CONFIG.rope_theta,
        **ROPES[rope],
    }
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa")
    plain.load_state_dict(exported.state_dict())
    mine, theirs = exported.model.rotary_emb, plain.model.rotary_emb
    assert mine.attention_scaling == theirs.attention_scaling
    assert (mine.attention_scaling != 1) == (rope == "yarn")
    tokens, positions = torch.randint(258, (1, 100)), torch.arange(100)[None]
    for ours, exact in zip(mine(torch.zeros(1), positions), theirs(torch.zeros(1), positions), strict=True):
        assert torch.equal(ours, exact)
    hidden = exported.model(tokens, position_ids=positions, use_cache=False, flashmask=FlashMask.from_lengths([100]))
    want = plain.model(tokens, position_ids=positions, use_cache=False)
    assert torch.allclose(hidden.last_hidden_state, want.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"rope_type": "linear"}, "model.rope_type: linear needs model.rope_factor"),
        ({"rope_type": "yarn", "rope_factor": 2.0}, "needs model.rope_original_max_position_embeddings"),
        ({"rope_factor": 2.0}, "model.rope_factor would have no effect with model.rope_type: default"),
        ({"rope_type": "linear", "rope_factor": 0.5}, "model.rope_factor must be at least 1"),
    ],
)
def test_rope_settings_that_do_not_fit_together(settings, told):
    with pytest.raises(ValueError, match=told):
        ModelConfig(**settings)


def test_start_has_the_asked_spread_and_depends_on_the_seed_alone():
    wide = ModelConfig(hidden_size=128, initializer_range=0.05)
    first, again, other = (dict(tiny_model(wide, seed=s).named_parameters()) for s in (0, 0, 1))
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if p.ndim == 1:
            assert bool((p == 1).all())
        else:
            assert float(p.detach().std()) == pytest.approx(0.05, rel=0.05)
            assert not torch.equal(p, other[name])
    matrices = [p.detach().flatten()[:64] for p in first.values() if p.ndim == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def sharded_start(path):
    config = Config(
        model=CONFIG if path is None else ModelConfig(path=path),
        train=TrainConfig(device="cpu"),
        parallel=ParallelConfig(context=1),
    )
    model = engines.make_engine(config, engines.start(config)).model
    assert model.causal_lm.lm_head.weight is model.causal_lm.model.embed_tokens.weight
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def test_start_does_not_depend_on_the_ranks():
    alone = dict(tiny_model().named_parameters())
    for start in run_ranks(3, sharded_start, None):
        assert start.keys() == alone.keys()
        assert all(torch.equal(start[name], p) for name, p in alone.items())


def test_weights_from_a_folder(tmp_path):
    saved = tiny_model(seed=5).causal_lm
    saved.save_pretrained(tmp_path)
    for start in run_ranks(2, sharded_start, str(tmp_path)):
        assert all(torch.equal(start[f"causal_lm.{name}"], p) for name, p in saved.named_parameters())


def test_folder_mistakes(tmp_path):
    with pytest.raises(ValueError, match="is not a Hugging Face model folder"):
        build(ModelConfig(path=str(tmp_path)), max_length=64)
    tiny_model().causal_lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor its index"):
        tiny_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    "name, parameters", [("llama1b_128k_1gpu", 1.2358e9), ("llama70b_128k", 70.554e9), ("dense123b_128k", 122.610e9)]
)
def test_big_shapes_build_on_meta(name, parameters):
    config = load(ROOT / "configs" / f"{name}.yaml")
    model = build(config.model, max_length=config.data.sequence_length)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-4)
