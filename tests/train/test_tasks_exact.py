"""Packed answers are worth what they are worth alone: loss and gradients against unpacked sequences in one process."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fm_longctx.train.config import Config, DataConfig, LoraConfig, ParallelConfig, TaskConfig, TrainConfig
from fm_longctx.train.engines import make_engine, start
from fm_longctx.train.inputs import make_loader, make_stream
from fm_longctx.train.model import materialize
from fm_longctx.train.tasks.models import build_model
from tests.distributed import run_ranks
from tests.train.task_records import DPO, REWARD, SFT, byte_tokens, write
from tests.train.tiny import CONFIG

BETA, SMOOTHING, CENTER = 0.3, 0.1, 0.02
PREFERENCE = TaskConfig(kind="dpo", beta=BETA, label_smoothing=SMOOTHING)
FULL, ADAPTERS = LoraConfig(), LoraConfig(r=3, alpha=6.0)
CASES = {
    "sft": (SFT, TaskConfig(kind="sft"), FULL),
    # The reference: a frozen copy; the records; the model without its adapters.
    "dpo": (DPO, PREFERENCE, FULL),
    "dpo-records": (DPO, replace(PREFERENCE, reference="records"), FULL),
    "dpo-lora": (DPO, PREFERENCE, ADAPTERS),
    "reward": (REWARD, TaskConfig(kind="reward", center_rewards_coefficient=CENTER), FULL),
}
# One long sequence, or two short ones, over data ranks or micro-batches; both prime.
LONG, SHORT = 173, 67


def configuration(path, case, length, context, batch_size=1):
    _, task, lora = CASES[case]
    return Config(
        task=task,
        model=CONFIG,
        data=DataConfig(source="jsonl", path=path[case], sequence_length=length, batch_size=batch_size),
        lora=lora,
        parallel=ParallelConfig(context=context, chunk_size=4),
        train=TrainConfig(device="cpu", loss_chunk=7),
    )


def move(model, *, seed):
    """Another model than the first: so that a policy is not its reference, and an adapter is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.empty(parameter.shape).uniform_(-0.05, 0.05, generator=generator)
                if isinstance(parameter, DTensor):
                    noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter += noise


def step_on_rank(path, cases, context, batches_a_rank, length, batch_size):
    """Loss, figures and whole gradients of one step of each case."""
    found = {}
    for case in cases:
        config = configuration(path, case, length, context, batch_size)
        world = start(config)
        engine = make_engine(config, world)
        move(engine.model, seed=1)
        loader = make_loader(config, world)
        batches = [next(loader) for _ in range(batches_a_rank)]
        loader.close()
        result = engine.gradients(batches)
        parameters = engine.model.causal_lm.named_parameters()
        found[case] = result, {n: p.grad.full_tensor() for n, p in parameters if p.grad is not None}
    return found


def plain(config):
    """The policy and the model as it was at the start, in float64 and transformers' own attention, and the adapters."""
    ours = build_model(config)
    materialize(ours, config.model, device=torch.device("cpu"), seed=0)
    kind = AutoModelForSequenceClassification if config.task.kind == "reward" else AutoModelForCausalLM
    models = []
    for moved in (False, True):
        if moved:
            move(ours.causal_lm, seed=1)
        state = ours.causal_lm.state_dict()
        adapters = {name: state.pop(name).double() for name in list(state) if ".lora_" in name}
        model = kind.from_config(ours.causal_lm.config, attn_implementation="sdpa", dtype=torch.float64)
        model.load_state_dict({name.replace(".base_layer.", "."): weight for name, weight in state.items()})
        for name, a in adapters.items():
            if ".lora_A." in name:
                weight = model.get_parameter(name.replace(".lora_A.default", ""))
                weight.data += config.lora.alpha / config.lora.r * adapters[name.replace("lora_A", "lora_B")] @ a
        models.append(model)
    reference, policy = models
    return policy, reference, adapters


def gradients_of(policy, adapters, lora):
    """Those of the weights; or of adapters, W = W0 + s B A, by the chain rule."""
    whole = {n: p.grad for n, p in policy.named_parameters()}
    if not adapters:
        return whole
    found, s = {}, lora.alpha / lora.r
    for name in adapters:
        base, _, part = name.partition(".lora_")
        d_weight = whole[f"{base}.weight"]
        other = adapters[f"{base}.lora_{'B' if part[0] == 'A' else 'A'}.default.weight"]
        found[name] = s * (other.t() @ d_weight if part[0] == "A" else d_weight @ other.t())
    return found


def alone(model, prompt, answer):
    """Log-probability of an answer's tokens after its prompt, or its score; the sequence by itself."""
    shared, own = byte_tokens(prompt, answer)
    tokens = torch.tensor([shared + own])
    if hasattr(model, "score"):
        return model.score(model.model(tokens, use_cache=False).last_hidden_state[0, -1])[0]
    log_probs = model(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
    return sum(log_probs[i - 1, tokens[0, i]] for i in range(len(shared), tokens.shape[1]))


def exact(config, case):
    """The loss in the words of its definition; its gradients; figures."""
    policy, reference, adapters = plain(config)
    model, records, kind = policy, CASES[case][0], config.task.kind
    accuracy = None
    if kind == "sft":
        losses = [-alone(model, r["prompt"], r["completion"]) for r in records]
        loss = sum(losses) / sum(len(byte_tokens("", r["completion"])[1]) for r in records)
    elif kind == "dpo":
        margins = []
        for r in records:
            gain = [
                alone(model, r["prompt"], r[a]) - alone(reference, r["prompt"], r[a]).detach()
                for a in r
                if a != "prompt"
            ]
            margins.append(gain[0] - gain[1])
        sigmoid = [torch.sigmoid(BETA * m) for m in margins]
        loss = sum(-(1 - SMOOTHING) * s.log() - SMOOTHING * (1 - s).log() for s in sigmoid) / len(records)
        accuracy = sum(float(m.detach()) > 0 for m in margins) / len(margins)
    else:
        terms = []
        for r in records:
            responses = r.get("responses") or [r["chosen"], r["rejected"]]
            value = r.get("scores") or (
                [-r["order"].index(i) for i in range(len(responses))] if "order" in r else [1, 0]
            )
            scores = [alone(model, r["prompt"], x) for x in responses]
            for i, better in enumerate(scores):
                for j, worse in enumerate(scores):
                    if value[i] > value[j]:
                        terms.append((better, worse, r.get("margin", 0.0)))
        assert len(terms) == 14 + 1 + 1  # of the six, two are equal
        loss = sum((1 + (w - b + m).exp()).log() + CENTER * (b + w) ** 2 for b, w, m in terms) / len(terms)
        accuracy = sum(bool(b > w) for b, w, _ in terms) / len(terms)
    loss.backward()
    return float(loss.detach()), accuracy, gradients_of(policy, adapters, config.lora)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    paths = {case: write(folder / f"{case}.jsonl", records) for case, (records, *_) in CASES.items()}
    _, reference, _ = plain(configuration(paths, "dpo", LONG, 1))
    known = [
        r | {f"ref_{a}_logps": float(alone(reference, r["prompt"], r[a]).detach()) for a in ("chosen", "rejected")}
        for r in DPO
    ]
    write(folder / "dpo-records.jsonl", known)
    return paths


@pytest.fixture(scope="module")
def references(files):
    return {case: exact(configuration(files, case, LONG, 1), case) for case in CASES}


@pytest.mark.parametrize(
    "data, context, batches, length, batch_size, cases",
    [
        (1, 1, 1, LONG, 1, ["sft", "dpo", "reward"]),
        (1, 2, 1, LONG, 1, list(CASES)),
        (1, 3, 1, LONG, 1, ["sft", "dpo", "reward"]),
        (2, 2, 1, SHORT, 1, ["dpo"]),
        (1, 2, 2, SHORT, 1, ["dpo-lora"]),
        (1, 2, 1, SHORT, 2, ["dpo-records"]),
    ],
)
def test_packed_equals_separate(files, references, data, context, batches, length, batch_size, cases):
    for case in cases:
        stream = make_stream(configuration(files, case, length, 1))
        # All records, once.
        assert sum(len(stream.sequence(i).lengths) for i in range(data * batches * batch_size)) == len(stream)
    for found in run_ranks(data * context, step_on_rank, files, cases, context, batches, length, batch_size):
        for case in cases:
            (result, gradients), (loss, accuracy, want) = found[case], references[case]
            assert result.loss == pytest.approx(loss, rel=1e-5), case
            norm = math.sqrt(sum(float((g**2).sum()) for g in want.values()))
            assert result.grad_norm == pytest.approx(norm, rel=1e-4), case
            assert gradients.keys() == want.keys()
            for name, gradient in want.items():
                assert (gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, (case, name)
            if accuracy is not None:
                assert result.figures[f"{CASES[case][1].kind}_accuracy"] == pytest.approx(accuracy), case
