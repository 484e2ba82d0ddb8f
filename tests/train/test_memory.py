"""What layers keep for the backward changes memory and repeated work, and not one bit of loss or gradients."""

import sys
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from fm_longctx import ContextParallel, FlashMask, ShardPlan
from fm_longctx.attention import library
from fm_longctx.context_parallel import attention as parallel_attention
from fm_longctx.context_parallel import heads
from fm_longctx.train import offload
from fm_longctx.train.chunked_mlp import ChunkedMLP
from fm_longctx.train.config import Config, ParallelConfig, TrainConfig
from fm_longctx.train.memory import prepare_layers
from fm_longctx.train.stochastic import stochastic_adamw
from tests.distributed import run_ranks
from tests.train.tiny import CONFIG, MadeUpStream, tiny_model

LENGTHS = [37, 26]
MODES = {
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "selective, MLPs kept": {"activation_checkpointing": "selective", "mlp_kept": 1},
    "full, offloaded": {"activation_checkpointing": "full", "activation_offload": True},
    "selective, offloaded": {"activation_checkpointing": "selective", "activation_offload": True},
}


def loss_and_gradients(train, dtype=torch.float32, **mask):
    """And how often attention, its exchange and an MLP ran."""
    packed = MadeUpStream([LENGTHS]).sequence(0)
    tensors = [x[None] for x in (packed.tokens, packed.labels, packed.positions)]
    if "context" in mask:
        rows = mask["context"].rows
        tensors = [x[:, rows] for x in tensors]
    model = tiny_model(dtype=dtype)
    with mock.patch.object(offload, "SMALLEST", 1):
        prepare_layers(model, TrainConfig(**train))
    counts = Counter()

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for layer in model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: counts.update(["gate"]))
        layer.mlp.down_proj.register_forward_hook(lambda *_: counts.update(["mlp"]))
    with (
        mock.patch.object(library, "attention_forward", counting("attention", library.attention_forward)),
        mock.patch.object(parallel_attention, "_arrivals", counting("attention", parallel_attention._arrivals)),
        mock.patch.object(parallel_attention, "start_keys", counting("exchange", parallel_attention.start_keys)),
        mock.patch.object(heads, "_trade", counting("trade", heads._trade)),
        mock.patch.object(offload, "_Offloaded", counting("offloaded", offload._Offloaded)),
    ):
        loss = model(*tensors, **mask)
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, counts


def assert_equal(mine, plain):
    assert torch.equal(mine[0], plain[0])
    assert mine[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(mine[1][name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_mode_changes_a_bit_and_selective_repeats_no_attention(dtype):
    layers = CONFIG.num_hidden_layers
    mask = {"flashmask": FlashMask.from_lengths(LENGTHS)}
    plain = loss_and_gradients({}, dtype, **mask)
    assert plain[2]["attention"] == layers
    for name, mode in MODES.items():
        mine = loss_and_gradients(mode, dtype, **mask)
        assert_equal(mine, plain)
        assert mine[2]["attention"] == (layers if "selective" in name else 2 * layers), name
        assert mine[2]["gate"] == 2 * layers - mode.get("mlp_kept", 0), name
        # The layer's input; attention's output and LSE.
        tensors = 3 if "selective" in name else 1
        assert mine[2]["offloaded"] == (tensors * layers if "offloaded" in name else 0), name


def on_rank(head_parallel):
    mask = FlashMask.from_lengths(LENGTHS)
    plan = ShardPlan.build(mask, dist.get_world_size(), chunk_size=8, head_parallel=head_parallel, num_stages=2)
    context = ContextParallel(dist.group.WORLD, plan, mask)
    plain = loss_and_gradients({}, context=context)
    counts = {}
    for name, mode in MODES.items():
        mine = loss_and_gradients(mode, context=context)
        assert_equal(mine, plain)
        counts[name] = dict(mine[2])
    return dict(plain[2]), counts


@pytest.mark.parametrize("head_parallel", [1, 2])
def test_selective_repeats_no_exchange_between_context_ranks(head_parallel):
    for plain, counts in run_ranks(4 if head_parallel == 2 else 3, on_rank, head_parallel):
        assert plain["exchange"] == plain["attention"] == CONFIG.num_hidden_layers
        for name, count in counts.items():
            again = 1 if "selective" in name else 2
            assert count["exchange"] == again * plain["exchange"], name
            assert count["attention"] == again * plain["attention"], name
            if head_parallel == 2:
                # Q, K, V and out, there and back.
                assert plain["trade"] == 8 * CONFIG.num_hidden_layers
                assert count["trade"] == plain["trade"] + (0 if again == 1 else 4 * CONFIG.num_hidden_layers), name


def test_a_second_backward_is_refused():
    packed = MadeUpStream([LENGTHS]).sequence(0)
    model = tiny_model()
    prepare_layers(model, TrainConfig(activation_checkpointing="selective"))
    tensors = [x[None] for x in (packed.tokens, packed.labels, packed.positions)]
    loss = model(*tensors, flashmask=FlashMask.from_lengths(LENGTHS))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has run"):
        loss.backward()


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_a_chunked_mlp_is_the_mlp(chunk):
    """Sums over chunks, so not to the bit; and under a checkpoint no chunk is computed a third time."""
    mask = {"flashmask": FlashMask.from_lengths(LENGTHS)}
    plain = loss_and_gradients({}, torch.float64, **mask)
    chunks = -(-sum(LENGTHS) // chunk) * CONFIG.num_hidden_layers
    for mode in ({}, *MODES.values()):
        if "mlp_kept" in mode:
            continue
        mine = loss_and_gradients(mode | {"mlp_chunk": chunk}, torch.float64, **mask)
        assert torch.allclose(mine[0], plain[0], rtol=1e-6)
        for name, gradient in plain[1].items():
            assert (mine[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        assert mine[2]["mlp"] == 2 * chunks, mode


def test_a_chunked_mlp_with_frozen_weights():
    mlp = tiny_model(dtype=torch.float64).layers[0].mlp
    mlp.up_proj.weight.requires_grad_(False)
    x = torch.randn(2, 5, CONFIG.hidden_size, dtype=torch.float64, requires_grad=True)
    wanted = [x, mlp.gate_proj.weight, mlp.down_proj.weight]
    exact = torch.autograd.grad(mlp(x).square().sum(), wanted)
    mlp.forward = ChunkedMLP(mlp, 3)
    mlp(x).square().sum().backward()
    for tensor, gradient in zip(wanted, exact, strict=True):
        assert torch.allclose(tensor.grad, gradient)
    assert mlp.up_proj.weight.grad is None
    with torch.no_grad():
        assert not mlp(x).requires_grad
    with pytest.raises(ValueError, match="at least 1"):
        ChunkedMLP(mlp, 0)


def test_compiled_parts_are_all_but_attention():
    """Under the eager stance: what is compiled, and that names and results stay; not the compiler."""
    mask = {"flashmask": FlashMask.from_lengths(LENGTHS)}
    plain = loss_and_gradients({}, **mask)
    with torch.compiler.set_stance("force_eager"), mock.patch.object(torch, "compile", wraps=torch.compile) as compiled:
        assert_equal(loss_and_gradients({"compile": True, "activation_checkpointing": "full"}, **mask), plain)
    assert compiled.call_count == 4 * CONFIG.num_hidden_layers + 1


def test_layers_share_their_compiled_code():
    """Four graphs whatever the layers: a norm, what comes before attention, what comes after it, the MLP."""
    mask = {"flashmask": FlashMask.from_lengths(LENGTHS)}
    plain = loss_and_gradients({}, torch.float64, **mask)
    # Without a compiler: cut into graphs as Inductor is given them.
    partitioned = partial(torch.compile, backend="aot_eager_decomp_partition")
    # Modules are told apart by their hooks.
    hooks = mock.patch.object(torch.nn.Linear, "register_forward_hook")
    with mock.patch.object(torch, "compile", partitioned), hooks:
        for mode in ({"activation_checkpointing": "selective", "mlp_kept": 1}, {"activation_checkpointing": "full"}):
            torch._dynamo.reset()
            counters.clear()
            loss, gradients, _ = loss_and_gradients(mode | {"compile": True}, torch.float64, **mask)
            assert counters["stats"]["unique_graphs"] == 4
            assert torch.allclose(loss, plain[0])
            for name, gradient in plain[1].items():
                assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_offload_and_kept_mlps_without_checkpoints_are_refused():
    with pytest.raises(ValueError, match="Set it to selective or full"):
        TrainConfig(activation_offload=True)
    with pytest.raises(ValueError, match="Set it to 0"):
        TrainConfig(mlp_kept=1)
    for saving in ({"mlp_chunk": 8}, {"activation_offload": True}):
        with pytest.raises(ValueError, match="spends memory"):
            TrainConfig(activation_checkpointing="full", mlp_kept=1, **saving)
    with pytest.raises(ValueError, match="the model has 2"):
        prepare_layers(tiny_model(), TrainConfig(activation_checkpointing="full", mlp_kept=3))


@pytest.mark.parametrize(
    "engine, option",
    [
        ("megatron", {"mlp_chunk": 8}),
        ("deepspeed", {"activation_checkpointing": "full", "mlp_kept": 1}),
        ("megatron", {"activation_checkpointing": "full", "activation_offload": True}),
        ("megatron", {"activation_checkpointing": "selective"}),
        ("deepspeed", {"compile": True}),
        ("deepspeed", {"mlp_chunk": 8}),
        ("deepspeed", {"precision": "bfloat16_stochastic"}),
    ],
)
def test_engines_refuse_what_they_do_not_know(engine, option):
    with pytest.raises(ValueError, match=f"parallel.engine: {engine} does not know train.{list(option)[-1]}"):
        Config(parallel=ParallelConfig(engine=engine), train=TrainConfig(**option))


def test_stochastic_rounding_keeps_small_updates():
    """An update of a thousandth is lost in bfloat16 near 1, where neighbours are 1/128 apart; on average it counts."""
    pytest.importorskip("torchao")
    steps, rate = 8, 1e-3
    moved = {}
    for name, make in (
        ("nearest", lambda p: torch.optim.AdamW([p], lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)),
        ("stochastic", lambda p: stochastic_adamw([{"params": [p]}], lr=rate, betas=(0.9, 0.95), eps=1e-8)),
    ):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16))
        optimizer = make(weight)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizer.state.values())
        moved[name] = 1.5 - float(weight.detach().double().mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(steps * rate, rel=0.15)


def test_stochastic_rounding_without_torchao_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match="pip install torchao"):
        stochastic_adamw([], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
