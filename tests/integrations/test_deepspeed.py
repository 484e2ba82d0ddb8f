"""The "flashmask" section of a DeepSpeed config: exact at every ZeRO stage, or refused with the reason."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from fm_longctx.integrations import deepspeed as plug
from fm_longctx.integrations import transformers as integration
from tests.distributed import run_ranks
from tests.integrations.deepspeed_world import deepspeed_world
from tests.integrations.families import make
from tests.integrations.separate import mean_loss
from tests.integrations.test_trainer import forget

pytest.importorskip("deepspeed")
GENERATOR = torch.Generator().manual_seed(11)
CLIP = 0.4


def words(n):
    return torch.randint(3, 64, (n,), generator=GENERATOR).tolist()


# What one data rank packs in one micro-batch; label counts differ much from one to the next.
MICRO_BATCHES = [
    [{"input_ids": words(21)}, {"input_ids": words(2)}],
    [{"prompt_ids": words(14), "chosen_ids": words(2), "rejected_ids": words(1)}],
    [{"input_ids": words(33)}],
    [{"segments": [words(5), words(4), words(7)], "parents": [-1, 0, 0]}, {"input_ids": words(3)}],
    [{"input_ids": words(4)}, {"input_ids": words(5)}],
    [{"prompt_ids": words(9), "completion_ids": [words(8), words(3), words(2)]}],
    [{"input_ids": words(29)}],
    [{"input_ids": words(2)}],
]


def config_of(stage, **changes):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
        "flashmask": {"context_parallel_size": 2, "chunk_size": 4},
    } | changes


def weights(deepspeed, engine):
    """float32, of the masters where the model's own are rounded."""
    if engine.bfloat16_enabled():
        get = deepspeed.utils.safe_get_full_fp32_param
        return {n: get(p).detach().clone().view(p.shape) for n, p in engine.module.named_parameters()}
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


def adam_of(model):
    # An epsilon like the gradients: no step is a mere sign, which rounding would decide.
    return torch.optim.Adam(model.parameters(), lr=0.01, eps=0.01)


def step(engine, step):
    """One optimizer step on the step's micro-batches of this data rank: their mean loss."""
    run = engine.flashmask
    first = (step * run.ranks.data_size + run.ranks.data_rank) * 2
    loader = DataLoader(MICRO_BATCHES[first : first + 2], batch_size=None, collate_fn=run.collator())
    (batches,) = run.steps(loader)
    labels = run.num_items(batches)
    total = 0.0
    for batch in batches:
        loss = engine(**run.prepare(batch), use_cache=False, num_items_in_batch=labels).loss
        engine.backward(loss)
        engine.step()
        total += loss.item() / len(batches)
    return total


def two_steps(stage, folder, **changes):
    """Losses and norms of two steps and the weights after; the second step again from a checkpoint of the first."""
    with deepspeed_world() as deepspeed:

        def engine_of():
            model = make("llama", "sdpa").to(torch.bfloat16 if "bf16" in changes else torch.float32)
            return plug.initialize(model=model, optimizer=optimizer_of(model), config=config_of(stage, **changes))[0]

        engine = engine_of()
        assert engine.module.config._attn_implementation == "fm_longctx"
        losses, norms = [step(engine, 0)], [engine.get_global_grad_norm()]
        if folder is not None:
            engine.save_checkpoint(folder, tag="first")
        losses.append(step(engine, 1))
        norms.append(engine.get_global_grad_norm())
        after = weights(deepspeed, engine)
        if folder is not None:
            other = engine_of()
            other.load_checkpoint(folder, tag="first")
            step(other, 1)
            assert all(torch.equal(after[n], p) for n, p in weights(deepspeed, other).items())
        return losses, [None if norm is None else float(norm) for norm in norms], after


def expected(data_size, optimizer_of=optimizer_of):
    """The same by one process: eager attention, each sequence alone, torch's own optimizer and clipping."""
    model = make("llama", "eager")
    optimizer = optimizer_of(model)
    losses, norms = [], []
    for first in (0, 2 * data_size):
        features = [f for batch in MICRO_BATCHES[first : first + 2 * data_size] for f in batch]
        optimizer.zero_grad()
        loss = mean_loss(model, features)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    assert min(norms) > CLIP  # or clipping is not tested
    return losses, norms, {n: p.detach() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def start():
    return {n: p.detach() for n, p in make("llama", "eager").named_parameters()}


def assert_changed(got, after, start, tolerance):
    """The change of each weight, but for the rounding of the weight itself."""
    for name, exact in after.items():
        rounding = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (got[name] - exact).abs().max() <= tolerance * (exact - start[name]).abs().max() + rounding, name


def check(results, want, start, tolerance):
    losses, norms, after = want
    # Every rank reports its share; their mean is the loss.
    for s, loss in enumerate(losses):
        assert sum(r[0][s] for r in results) / len(results) == pytest.approx(loss, rel=tolerance)
    for _, got, changed in results:
        # Without ZeRO and in float32 DeepSpeed clips but does not tell the norm.
        assert got in ([None, None], pytest.approx(norms, rel=tolerance))
        assert_changed(changed, after, start, tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_equals_one_rank(stage, tmp_path, start):
    results = run_ranks(2, two_steps, stage, str(tmp_path), timeout=600)
    check(results, expected(1), start, 2e-5)


@pytest.mark.parametrize("stage", [3])
def test_two_data_ranks_of_two(stage, start):
    check(run_ranks(4, two_steps, stage, None, timeout=600), expected(2), start, 2e-5)


def test_bfloat16(start):
    """Weights and gradients rounded to bfloat16, about 3 digits; the masters stay float32."""
    rounded = {name: weight.bfloat16().float() for name, weight in start.items()}
    results = run_ranks(2, two_steps, 2, None, bf16={"enabled": True}, timeout=600)
    losses, norms, after = expected(1)
    for s, loss in enumerate(losses):
        assert sum(r[0][s] for r in results) / 2 == pytest.approx(loss, rel=0.02)
    for _, got, changed in results:
        assert got == pytest.approx(norms, rel=0.05)
        for name, exact in after.items():
            mine, change = changed[name] - rounded[name], exact - start[name]
            assert torch.nn.functional.cosine_similarity(mine.flatten(), change.flatten(), dim=0) > 0.97, name


def accelerated():
    """The loop that Accelerate's users write; it calls deepspeed.initialize itself."""
    from accelerate import Accelerator, DeepSpeedPlugin

    forget()
    try:
        with deepspeed_world() as deepspeed:
            plug.install()
            accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(2)))
            model = make("llama", "sdpa")
            engine, optimizer = accelerator.prepare(model, optimizer_of(model))
            run = engine.flashmask
            losses, norms = [], []
            for first in (0, 2):
                loader = DataLoader(MICRO_BATCHES[first : first + 2], batch_size=None, collate_fn=run.collator())
                (batches,) = run.steps(loader)
                labels = run.num_items(batches)
                losses.append(0.0)
                for batch in batches:
                    with accelerator.accumulate(engine):
                        loss = engine(**run.prepare(batch), use_cache=False, num_items_in_batch=labels).loss
                        accelerator.backward(loss)
                        optimizer.step()
                        optimizer.zero_grad()
                        losses[-1] += loss.item() / len(batches)
                norms.append(float(engine.get_global_grad_norm()))
            return losses, norms, weights(deepspeed, engine)
    finally:
        forget()


def test_accelerate_honours_the_section(start):
    check(run_ranks(2, accelerated, timeout=600), expected(1), start, 2e-5)


def first_step(folder, cp):
    with deepspeed_world() as deepspeed:
        model = make("llama", "sdpa")
        config = config_of(1, flashmask={"context_parallel_size": cp, "chunk_size": 4})
        if folder.endswith("universal"):
            config["checkpoint"] = {"load_universal": True}
        engine = plug.initialize(model=model, optimizer=adam_of(model), config=config)[0]
        if folder.endswith("universal"):
            engine.load_checkpoint(folder.removesuffix("universal"), tag="universal")
            step(engine, 1)
            return weights(deepspeed, engine)
        step(engine, 0)
        engine.save_checkpoint(folder, tag="first")


def test_a_universal_checkpoint_moves_to_another_number_of_ranks(tmp_path, start):
    """Two ranks that share a sequence save; one rank without context parallelism goes on."""
    run_ranks(2, first_step, str(tmp_path), 2, timeout=600)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1"]
    folders = [f"--input_folder={tmp_path}/first", f"--output_folder={tmp_path}/universal"]
    subprocess.run([*command, "--num_merge_workers=1", "--inject_missing_state", *folders], check=True, timeout=600)
    (after,) = run_ranks(1, first_step, f"{tmp_path}/universal", 1, timeout=600)
    assert_changed(after, expected(1, adam_of)[2], start, 2e-4)


def ulysses(tree):
    """DeepSpeed's own sequence parallelism over heads, our attention inside: this rank's logits, and all gradients."""
    from fm_longctx.mask import builders

    with deepspeed_world() as deepspeed:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        deepspeed.init_distributed()
        integration.register()
        model = make("llama", integration.NAME)
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None
        UlyssesSPAttentionHF.register_with_transformers(
            model, core_attn_implementation=integration.NAME, sequence_parallel_size=2, micro_batch_size=1
        )
        try:
            tokens, positions, _ = ulysses_batch(tree)
            mask = {"flashmask": builders.prefix_tree([-1, 0, 0], [10, 6, 8])} if tree else {}
            mine = slice(12 * torch.distributed.get_rank(), None)
            mine = slice(mine.start, mine.start + 12)
            logits = model(tokens[:, mine], position_ids=positions[:, mine], use_cache=False, **mask).logits
            logits.log_softmax(-1)[..., :9].square().sum().backward()
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
            return logits.detach(), {n: p.grad for n, p in model.named_parameters()}
        finally:
            del ALL_ATTENTION_FUNCTIONS[integration.NAME]  # it put itself before ours


def ulysses_batch(tree):
    tokens = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(2))
    if tree:
        positions = torch.cat([torch.arange(16), torch.arange(10, 18)])[None]
        end = [24] * 10 + [16] * 6 + [24] * 8
    else:
        positions = torch.cat([torch.arange(7), torch.arange(17)])[None]
        end = [7] * 7 + [24] * 17
    visible = torch.tensor([[c <= r < end[c] for c in range(24)] for r in range(24)])
    return tokens, positions, visible


@pytest.mark.parametrize("tree", [False, True])
def test_ulysses_with_our_attention_inside(tree):
    tokens, positions, visible = ulysses_batch(tree)
    model = make("llama", "eager")
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    want = model(tokens, position_ids=positions, attention_mask=additive, use_cache=False).logits
    want.log_softmax(-1)[..., :9].square().sum().backward()
    results = run_ranks(2, ulysses, tree, timeout=600)
    got = torch.cat([logits for logits, _ in results], 1)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    for name, parameter in model.named_parameters():
        assert (results[0][1][name] - parameter.grad).abs().max() <= 3e-5 * parameter.grad.abs().max(), name


def refusals():
    """What each config is refused with, on a rank of two."""
    with deepspeed_world():
        said = []
        for keywords, changes in REFUSED:
            model = torch.nn.Linear(2, 2)
            try:
                plug.initialize(model=model, config=config_of(0, **changes), **keywords)
                said.append("accepted")
            except ValueError as error:
                said.append(str(error))
        return said


REFUSED = [
    ({"mpu": object()}, {}),
    ({"mesh_param": (1, 2)}, {}),
    ({}, {"sequence_parallel_size": 2}),
    ({}, {"tensor_parallel": {"autotp_size": 2}}),
    ({}, {"gradient_allreduce_op": "sum"}),
    ({}, {"flashmask": {"context_parallel_sise": 2}}),
    ({}, {"flashmask": {"context_parallel_size": 0}}),
    ({}, {"flashmask": {"context_parallel_size": 2, "chunk_size": "4"}}),
    ({}, {"flashmask": {"strategy": "ring"}}),
    ({}, {"flashmask": 2}),
    ({}, {"flashmask": {"context_parallel_size": 3}}),
]
SAID = [
    "cannot be combined with an mpu",
    "cannot be combined with mesh_param",
    "cannot be combined with sequence_parallel_size",
    "cannot be combined with tensor_parallel.autotp_size",
    'cannot be combined with gradient_allreduce_op "sum"',
    "flashmask.context_parallel_sise is not known. Did you mean context_parallel_size?",
    "flashmask.context_parallel_size must be an integer >= 1, got 0",
    "flashmask.chunk_size must be an integer >= 1 or null, got '4'",
    "flashmask.strategy must be one of ['balanced', 'zigzag', 'contiguous'], got 'ring'",
    '"flashmask" must be a mapping',
    "context_parallel_size=3 does not divide the 2 ranks",
]


def test_refuses():
    for said in run_ranks(2, refusals, timeout=600):
        for got, want in zip(said, SAID, strict=True):
            assert want in got


def places(folder):
    """The section wherever DeepSpeed takes a config from; through `initialize` and after `install`."""
    with deepspeed_world() as deepspeed:
        config = config_of(0, train_batch_size=2)
        path = f"{folder}/{torch.distributed.get_rank()}.json"
        with open(path, "w") as file:
            json.dump(config, file)
        model = make("llama", "sdpa")
        calls = [{"config": config}, {"config_params": config}, {"config": path}]
        calls.append({"args": argparse.Namespace(deepspeed_config=path, local_rank=torch.distributed.get_rank())})
        seen = []
        plug.install()
        plug.install()
        for call in calls:
            for initialize in (plug.initialize, deepspeed.initialize):
                engine = initialize(model=model, optimizer=optimizer_of(model), **call)[0]
                seen.append((engine.flashmask.ranks.size, engine.train_batch_size()))
        plain = {**config, "train_batch_size": 4}
        del plain["flashmask"]
        engine = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=plain)[0]
        seen.append(getattr(engine, "flashmask", None))
        assert config["train_batch_size"] == 2  # the caller's own dict is left alone
        return seen


def test_the_section_is_found_wherever_the_config_is(tmp_path):
    for seen in run_ranks(2, places, str(tmp_path), timeout=600):
        # Two sequences a step, to DeepSpeed four: it multiplies by ranks.
        assert seen == [(2, 4)] * 8 + [None]


@pytest.mark.parametrize(
    "batch, want", [({"train_batch_size": 6}, 12), ({"train_batch_size": "auto"}, "auto"), ({}, None)]
)
def test_train_batch_size_counts_sequences(batch, want):
    assert plug._count_each_sequence_once(batch, 2).get("train_batch_size") == want


def test_a_config_without_the_section_is_refused_by_initialize():
    with pytest.raises(ValueError, match='no "flashmask" section'):
        plug.initialize(model=torch.nn.Linear(2, 2), config={"train_batch_size": 1})
