"""Records, encoders, the record stream, losses and log-probabilities, each by itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fm_longctx.data import IGNORED
from fm_longctx.data.jsonl import JsonLines
from fm_longctx.train import config_load, plan_cli
from fm_longctx.train.config import TaskConfig
from fm_longctx.train.dry_run import describe
from fm_longctx.train.tasks import losses
from fm_longctx.train.tasks.encoder import ByteEncoder, HuggingFaceEncoder
from fm_longctx.train.tasks.log_probs import sequence_log_probs
from fm_longctx.train.tasks.records import parser
from fm_longctx.train.tasks.stream import READ_AT, RecordStream
from tests.train.task_records import BOS, DPO, EOS, REWARD, SFT, byte_tokens, write

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %}{{ m.content }}[E]{% endgeneration %}"
    "{% else %}[U]{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)


@pytest.fixture(scope="module")
def chat():
    """Words of one character; "ab" is one token, so that a boundary can lie within it."""
    words = ["[U]", "[A]", "[E]", "ab", *"abcdxyz? "]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split("[", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[U]", "[A]"]})
    tokenizer.chat_template = TEMPLATE
    return HuggingFaceEncoder(tokenizer)


def record(kind, content, encoder=None, **options):
    return parser(TaskConfig(kind=kind, **options), encoder or ByteEncoder())(content)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_records_of_text():
    question, answer = byte_tokens("copy: a", "aaa")
    root, leaf = record("sft", SFT[0]).nodes
    assert (root.tokens, root.is_sequence, set(root.labels)) == (question, False, {IGNORED})
    assert leaf.tokens == leaf.labels == answer
    shared, chosen = byte_tokens("what?", "that")
    assert [n.tokens for n in record("dpo", DPO[0]).nodes] == [shared, chosen, [*b"this one", EOS]]


def test_what_answers_begin_with_belongs_to_them():
    """The question ends where the prompt does, also where both answers go on alike."""
    nodes = record("dpo", {"prompt": "q", "chosen": "same a", "rejected": "same b"}).nodes
    assert [n.tokens for n in nodes] == [[BOS, *b"q"], [*b"same a", EOS], [*b"same b", EOS]]
    nodes = record("dpo", {"chosen": "same a", "rejected": "same b"}).nodes
    assert [n.tokens for n in nodes] == [[BOS, *b"same "], [*b"a", EOS], [*b"b", EOS]]


def test_pairs_of_a_reward_record():
    assert record("reward", REWARD[1]).pairs == ((1, 0),)
    six = record("reward", REWARD[0])
    scores = REWARD[0]["scores"]
    assert six.num_answers == 6
    assert set(six.pairs) == {(i, j) for i in range(6) for j in range(6) if scores[i] > scores[j]}
    assert record("reward", REWARD[2]).margins == (0.25,)


def test_references_of_records():
    content = DPO[0] | {"ref_chosen_logps": -3.5, "ref_rejected_logps": -4}
    assert record("dpo", content, reference="records").references == (-3.5, -4.0)


def test_conversations(chat):
    ids = chat.tokenizer.convert_tokens_to_ids
    talk = [user("ab"), assistant("c"), user("d"), assistant("xy")]
    (node,) = record("sft", {"messages": talk}, chat).nodes
    text = ["[U]", "ab", "[A]", "c", "[E]", "[U]", "d", "[A]", "x", "y", "[E]"]
    assert node.tokens == node.labels == ids(text)
    (node,) = record("sft", {"messages": talk}, chat, assistant_only=True).nodes
    own = [False, False, False, True, True, False, False, False, True, True, True]
    assert node.labels == [t if o else IGNORED for t, o in zip(ids(text), own, strict=True)]

    pair = {"prompt": [user("ab")], "chosen": [assistant("x")], "rejected": [assistant("y")]}
    assert [n.tokens for n in record("dpo", pair, chat).nodes] == [
        ids(["[U]", "ab", "[A]"]),
        ids(["x", "[E]"]),
        ids(["y", "[E]"]),
    ]


def test_tokens_that_merge_across_the_boundary(chat):
    ids = chat.tokenizer.convert_tokens_to_ids
    nodes = record("dpo", {"prompt": "xa", "chosen": "b", "rejected": "c"}, chat).nodes
    assert [n.tokens for n in nodes] == [ids(["x"]), ids(["ab", "[E]"]), ids(["a", "c", "[E]"])]


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("sft", {"text": "x"}, r"has the fields \['text'\], but this task reads messages; or prompt, completion"),
        ("sft", {"messages": [{"role": "user", "content": "x"}]}, "bytes have no chat template"),
        ("sft", {"prompt": "x", "completion": 3}, "prompt and answers must be all text"),
        ("dpo", DPO[0] | {"ref_chosen_logps": -1.0}, "task.reference is model"),
        ("dpo", DPO[0] | {"margin": 1}, "but this task reads prompt, chosen, rejected"),
        ("dpo", {"prompt": "x", "chosen": "a", "rejected": [assistant("b")]}, "got str and list"),
        ("dpo", {"chosen": "same", "rejected": "same"}, "an answer has no tokens of its own"),
        ("reward", REWARD[0] | {"scores": [1, 2]}, "a number for each of the 6 responses"),
        ("reward", REWARD[0] | {"scores": [1, 1, 1, 1, 1, 1]}, "have the same score"),
        ("reward", REWARD[1] | {"order": [0, 0]}, r"each of 0\.\.1 once"),
        ("reward", {"prompt": "x", "responses": ["a"], "scores": [1]}, "at least 2"),
        ("reward", REWARD[2] | {"margin": "much"}, "margin must be a number"),
    ],
)
def test_bad_records(kind, content, message):
    with pytest.raises(ValueError, match=message):
        record(kind, content)


def stream_of(path, kind, records, length, **options):
    lines = JsonLines.from_path(write(path / f"{kind}.jsonl", records))
    rows = "ends" if kind == "reward" else "labels"
    options = {"seed": 0} | options
    return RecordStream(
        lines, parser(TaskConfig(kind=kind), ByteEncoder()), rows=rows, sequence_length=length, **options
    )


def test_sequences_hold_every_record_once_an_epoch(tmp_path):
    records = [{"prompt": f"{i} " * (i % 4), "chosen": f"c{i}", "rejected": "r" * (i % 7 + 1)} for i in range(23)]
    stream = stream_of(tmp_path, "dpo", records, 61)
    want = sorted(bytes(byte_tokens("", r["chosen"])[1][:-1]).decode() for r in records)
    index = 0
    orders = []
    for _ in range(2):
        found = []
        while len(found) < 23:
            packed = stream.sequence(index)
            assert packed.tokens.shape == packed.labels.shape == packed.positions.shape == (61,)
            for answer in range(0, packed.about.count, 2):
                labels = packed.labels[packed.extra[READ_AT] == answer]
                assert labels[-1] == EOS
                found.append(bytes(labels[:-1].tolist()).decode())
            index += 1
        assert sorted(found) == want
        orders.append(found)
    assert orders[0] != orders[1]
    again = stream_of(tmp_path, "dpo", records, 61)
    assert torch.equal(again.sequence(index - 1).tokens, stream.sequence(index - 1).tokens)
    assert again.fingerprint() == stream.fingerprint()
    assert stream_of(tmp_path, "dpo", records, 61, seed=1).fingerprint() != stream.fingerprint()


def test_the_mask_of_a_packed_record(tmp_path):
    """Rows by hand: the question but its last token, then for each answer that token and its own; then padding."""
    content = {"prompt": "ab", "responses": ["x", "yz"], "scores": [1, 2]}
    packed = stream_of(tmp_path, "reward", [content], 12).sequence(0)
    x, y, z, a, b = (ord(c) for c in "xyzab")
    assert packed.tokens.tolist() == [BOS, a, b, x, EOS, b, y, z, EOS, 0, 0, 0]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0, 0]
    assert packed.extra[READ_AT].tolist() == [-1, -1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1]
    part = [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5]
    visible = [[r >= c and part[c] in {part[r], 0 if part[r] < 3 else part[r]} for c in range(12)] for r in range(12)]
    assert packed.mask.to_dense()[0, 0].tolist() == visible
    assert packed.num_padding == 3


def test_records_that_are_too_long(tmp_path):
    with pytest.raises(ValueError, match=r"takes 27 tokens, more than data.sequence_length=25 \(1 of 4 records do\)"):
        stream_of(tmp_path, "sft", [*SFT[:1], SFT[2] | {"completion": "too long"}, *SFT[:2]], 25)
    stream = stream_of(tmp_path, "sft", SFT, 18, too_long="drop")
    assert (stream.dropped, len(stream)) == (1, 3)
    with pytest.raises(ValueError, match="none of the 4 records"):
        stream_of(tmp_path, "sft", SFT, 5, too_long="drop")


def test_a_bad_line_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"record 1 of .*: it has the fields"):
        stream_of(tmp_path, "sft", [SFT[0], {"chosen": "x"}], 64)


@pytest.mark.parametrize("needs_weight", [True, False])
def test_log_probs_of_sequences(needs_weight):
    torch.manual_seed(0)
    hidden = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, dtype=torch.float64, requires_grad=needs_weight)
    labels = torch.randint(0, 31, (2, 13))
    labels[torch.rand(2, 13) < 0.3] = IGNORED
    ids = torch.randint(0, 4, (2, 13)).where(labels != IGNORED, -1)
    mine = sequence_log_probs(hidden, weight, labels, ids, 5, chunk=4)
    exact = [
        sum(
            (hidden[b, t] @ weight.t()).log_softmax(-1)[labels[b, t]]
            for b in range(2)
            for t in range(13)
            if ids[b, t] == s
        )
        for s in range(4)
    ]
    assert mine[:4].tolist() == pytest.approx([float(e.detach()) for e in exact], rel=1e-12)
    assert mine[4] == 0
    scale = torch.tensor([1.0, -2.0, 3.0, 0.5, 7.0], dtype=torch.float64)
    inputs = [hidden, weight][: 1 + needs_weight]
    got = torch.autograd.grad((mine * scale).sum(), inputs)
    want = torch.autograd.grad(sum(e * s for e, s in zip(exact, scale, strict=False)), inputs)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 1e-12


def test_log_probs_without_a_label_still_have_a_gradient():
    """A rank that holds a prompt only takes part in the backward all the same."""
    hidden, weight = torch.randn(1, 5, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    none = torch.full((1, 5), IGNORED)
    sequence_log_probs(hidden, weight, none, none, 3).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_losses_by_hand():
    margin = torch.tensor([0.0, 2.0, -1.0])

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    right = [-math.log(sigma(0.5 * m)) for m in (0, 2, -1)]
    swapped = [-math.log(1 - sigma(0.5 * m)) for m in (0, 2, -1)]
    assert losses.dpo(margin, beta=0.5).tolist() == pytest.approx(right)
    smooth = [0.8 * r + 0.2 * s for r, s in zip(right, swapped, strict=True)]
    assert losses.dpo(margin, beta=0.5, label_smoothing=0.2).tolist() == pytest.approx(smooth)
    # Robust: the expectation over swapped labels is the loss of the right ones.
    robust = losses.dpo(margin, beta=0.5, label_smoothing=0.2, kind="robust")
    flipped = losses.dpo(-margin, beta=0.5, label_smoothing=0.2, kind="robust")
    assert (0.8 * robust + 0.2 * flipped).tolist() == pytest.approx(right, rel=1e-5)
    scores = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    plain = [-math.log(sigma(1 - 0.5)), -math.log(sigma(-2))]
    got = losses.bradley_terry(*scores, margin=torch.tensor([0.5, 0.0]), center=0.1)
    assert got.tolist() == pytest.approx([plain[0] + 0.1, plain[1] + 0.4])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"task.beta": 0.2}, r"task\.beta is read only by task\.kind: dpo, but task\.kind is pretrain"),
        ({"task.kind": "sft"}, r"set data\.source to jsonl"),
        ({"task.kind": "dpo", "task.label_smoothing": 0.5}, "at least 0 and below 0.5"),
        ({"lora.alpha": 4.0}, r"there are no adapters\. Set lora\.r"),
        ({"lora.r": 0}, r"lora\.r must be at least 1"),
        ({"lora.r": 4, "lora.target_modules": " , "}, "must be all-linear or names"),
        ({"lora.r": 4, "parallel.engine": "deepspeed"}, r"lora needs parallel\.engine: fsdp"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(ValueError, match=message):
        config_load.build(values)


def test_a_task_by_its_name_alone(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"task": "reward", "data": {"source": "jsonl", "path": "x"}}))
    assert config_load.load(path).task.kind == "reward"
    with pytest.raises(ValueError, match="must be one of pretrain, sft, dpo, reward, got 'rlhf'"):
        path.write_text("task: rlhf")
        config_load.load(path)


def test_dry_run_and_plan_know_records(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = describe(config_load.load("configs/dpo_cpu.yaml", ["--parallel.ranks", "2"]))
    assert "64 records" in text
    assert plan_cli.main(["--config", "configs/dpo_cpu.yaml"], usage=None) == 0
    assert plan_cli.main(["--config", "configs/dpo_cpu.yaml", "--mask", "full"], usage=None) == 2
    assert "has shared questions" in capsys.readouterr().err
