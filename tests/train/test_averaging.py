"""Every label of a step weighs the same: any mesh and any accumulation against one process with dense float64 masks."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fm_longctx.data import IGNORED, Loader
from fm_longctx.train.config import Config, OptimizerConfig, ParallelConfig, TrainConfig
from fm_longctx.train.engines import start
from fm_longctx.train.engines.fsdp import FsdpEngine
from fm_longctx.train.model import build
from fm_longctx.train.step import train_step
from tests.distributed import run_ranks
from tests.train.tiny import CONFIG, MadeUpStream, tiny_model

# 62, 32, 0, 60, 5, 61 labels: ranks and micro-batches that an unweighted mean would get wrong.
LENGTHS = [[63], [1] * 30 + [33], [1] * 63, [40, 22, 1], [2, 2, 2, 2, 2, *[1] * 53], [60, 3]]

CHUNKS = {"chunk_size": 8}


def gradients_of_one_step(context, accumulation, dtype, parallel, **train):
    """The loss of a step, and its gradients as the change of the weights under plain descent at rate 1."""
    config = Config(
        model=CONFIG,
        parallel=ParallelConfig(context=context, **parallel),
        optimizer=OptimizerConfig(clip_norm=None),
        train=TrainConfig(device="cpu", gradient_accumulation=accumulation, **train),
    )
    world = start(config)
    model = build(config.model, max_length=63, loss_chunk=7, dtype=dtype)
    engine = FsdpEngine(config, world, model=model)
    engine.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = Loader(
        MadeUpStream(LENGTHS),
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        cp_rank=world.cp_rank,
        cp_size=world.cp_size,
        plan_options=config.parallel.plan_options,
    )
    batches = [next(loader) for _ in range(accumulation)]
    loader.close()
    before = {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}
    result = train_step(engine, batches)
    change = {n: before[n] - p.detach().full_tensor() for n, p in model.named_parameters()}
    return result, change


def exact():
    """One process, plain transformers, float64, whole logits, dense masks from the words; mean over all labels."""
    model = tiny_model(dtype=torch.float64)
    plain = AutoModelForCausalLM.from_config(model.causal_lm.config, attn_implementation="sdpa", dtype=torch.float64)
    plain.load_state_dict(model.causal_lm.state_dict())
    total, labels = torch.zeros((), dtype=torch.float64), 0
    for index, lengths in enumerate(LENGTHS):
        packed = MadeUpStream(LENGTHS).sequence(index)
        owner = [d for d, n in enumerate(lengths) for _ in range(n)]
        visible = torch.tensor([[r >= c and owner[r] == owner[c] for c in range(63)] for r in range(63)])
        logits = plain(
            packed.tokens[None],
            attention_mask=visible[None, None],
            position_ids=packed.positions[None],
            use_cache=False,
        ).logits
        total = total + F.cross_entropy(logits[0], packed.labels, reduction="sum", ignore_index=IGNORED)
        labels += sum(n - 1 for n in lengths)
    mean = total / labels
    mean.backward()
    return float(mean.detach()), labels, {f"causal_lm.{n}": p.grad for n, p in plain.named_parameters()}


@pytest.fixture(scope="module")
def reference():
    return exact()


@pytest.mark.parametrize(
    "data, context, accumulation, parallel, train",
    [
        (1, 1, 6, CHUNKS, {}),
        (2, 1, 3, CHUNKS, {}),
        (3, 1, 2, CHUNKS, {"activation_checkpointing": "full"}),
        (1, 2, 6, CHUNKS, {}),
        (1, 3, 6, {"strategy": "zigzag", "stages": 3}, {"activation_checkpointing": "full"}),
        (2, 2, 3, CHUNKS | {"head_parallel": 2}, {}),
        (2, 2, 3, CHUNKS | {"replicate": 2}, {}),
        (1, 1, 6, {"tensor": 2}, {"activation_checkpointing": "full"}),
    ],
)
def test_gradients_equal_one_process(reference, data, context, accumulation, parallel, train):
    loss, labels, want = reference
    for result, change in run_ranks(
        data * context * parallel.get("tensor", 1),
        gradients_of_one_step,
        context,
        accumulation,
        torch.float64,
        parallel,
        **train,
    ):
        assert result.labels == labels
        assert result.loss == pytest.approx(loss, rel=1e-6)
        norm = torch.stack([g.norm() for g in want.values()]).norm()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert change.keys() == want.keys()
        for name, gradient in want.items():
            # Norms and rotary angles are float32 inside the Hugging Face model, whatever its dtype.
            assert (change[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_bfloat16_weights_and_float32_sums():
    """Close to float32 from the same start, and the master weights and their gradients stay float32."""
    want = run_ranks(2, gradients_of_one_step, 2, 6, torch.float32, CHUNKS)
    for mine, (exact, gradients) in zip(
        run_ranks(2, gradients_of_one_step, 2, 6, torch.float32, CHUNKS, precision="bfloat16"), want, strict=True
    ):
        assert mine[0].loss == pytest.approx(exact.loss, rel=1e-2)
        assert mine[0].loss != exact.loss
        for name, gradient in gradients.items():
            assert mine[1][name].dtype == torch.float32
            assert F.cosine_similarity(mine[1][name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def step_with_a_bad_weight():
    config = Config(model=CONFIG, train=TrainConfig(device="cpu"))
    world = start(config)
    engine = FsdpEngine(config, world)
    model = engine.model
    weights = dict(model.named_parameters())["causal_lm.model.norm.weight"]
    with torch.no_grad():
        # On one rank's shard only.
        weights.to_local()[:1] = float("nan") if world.rank == 0 else 1.0
    loader = Loader(MadeUpStream(LENGTHS[:1]), dp_rank=world.dp_rank, dp_size=world.dp_size)
    batch = next(loader)
    loader.close()
    before = [p.detach().to_local().clone() for p in model.parameters()]
    fault = train_step(engine, [batch]).fault
    same = [
        torch.equal(a, p.detach().to_local())
        for a, p in zip(before, model.parameters(), strict=True)
        if a.isfinite().all()
    ]
    return fault, all(same) and len(same) >= len(before) - 1


def test_not_finite_stops_every_rank_before_the_step():
    for fault, unmoved in run_ranks(2, step_with_a_bad_weight):
        assert fault == "the loss is nan"
        assert unmoved
