"""attn_implementation="fm_longctx": every family equals eager attention with a dense mask, and no mask is dropped."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorWithFlattening

from fm_longctx import ContextParallel, FlashMask, ShardPlan
from fm_longctx.integrations import transformers as integration
from fm_longctx.integrations.transformers import layer
from fm_longctx.mask import builders
from tests.integrations.families import ALL, FAMILIES, WINDOW, assert_close, dense, gradients, make

LENGTHS = [20, 1, 42]
N = sum(LENGTHS)
OWNER = [d for d, n in enumerate(LENGTHS) for _ in range(n)]
VISIBLE = torch.tensor([[r >= c and OWNER[r] == OWNER[c] for c in range(N)] for r in range(N)])[None]
TOKENS = torch.randint(3, 64, (2, N), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
MASK = FlashMask.from_lengths(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def outcome(model, tokens=TOKENS, counted=None, **keywords):
    keywords.setdefault("position_ids", POSITIONS)
    keywords.setdefault("use_cache", False)
    return gradients(model, model(tokens, **keywords).logits, counted)


def eager(family, visible=VISIBLE, **keywords):
    return outcome(make(family, "eager"), attention_mask=dense(family, visible), **keywords)


@pytest.mark.parametrize("family", ALL)
def test_packed_documents_equal_eager(family):
    """Told by positions or given as a mask, with all activations kept or recomputed."""
    want = eager(family)
    assert_close(outcome(make(family, integration.NAME)), want)
    assert_close(outcome(make(family, integration.NAME), flashmask=MASK), want)
    for reentrant in (False, True):
        model = make(family, integration.NAME)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        # The older form of recomputation takes gradients through what enters a layer alone.
        model.enable_input_require_grads()
        assert_close(outcome(model, **({"flashmask": MASK} if reentrant else {})), want)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_documents_equal_sdpa_and_survive_a_cache(family):
    """transformers itself forgets packed documents when use_cache is left on."""
    want = outcome(make(family, "sdpa"), attention_mask=VISIBLE.expand(2, 1, N, N))
    assert_close(outcome(make(family, integration.NAME), use_cache=True), want)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    real = torch.ones(2, N, dtype=torch.bool)
    real[1, slice(0, 13) if side == "left" else slice(N - 13, None)] = False
    rows = torch.arange(N)
    visible = (rows[:, None] >= rows)[None] & real[:, None, :]
    positions = rows.expand(2, -1)
    want = eager(family, visible, position_ids=positions, counted=real)
    got = outcome(make(family, integration.NAME), attention_mask=real.long(), position_ids=positions, counted=real)
    assert_close(got, want)
    # Explicit masks hide the padding too.
    got = outcome(
        make(family, integration.NAME),
        attention_mask=real.long(),
        position_ids=positions,
        counted=real,
        flashmask=builders.causal(N),
    )
    assert_close(got, want)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_an_explicit_mask_that_is_not_causal(family):
    prefixes = [7, 0, 30]
    inside = [p - sum(LENGTHS[:d]) for p, d in zip(range(N), OWNER, strict=True)]
    visible = torch.tensor(
        [[OWNER[r] == OWNER[c] and (r >= c or inside[c] < prefixes[OWNER[c]]) for c in range(N)] for r in range(N)]
    )[None]
    mask = builders.prefix_lm_document(LENGTHS, prefixes)
    assert_close(outcome(make(family, integration.NAME), flashmask=mask), eager(family, visible))


def test_a_mask_for_each_kind_of_layer():
    rows = torch.arange(N)
    own = {
        "full_attention": VISIBLE,
        "sliding_attention": VISIBLE & (rows[:, None] - rows < 5),
    }
    additive = {k: torch.where(m, 0.0, torch.finfo(torch.float32).min)[:, None] for k, m in own.items()}
    want = outcome(make("gemma3", "eager"), attention_mask=additive)
    masks = {"full_attention": MASK, "sliding_attention": MASK & builders.sliding_window(N, 5)}
    assert_close(outcome(make("gemma3", integration.NAME), flashmask=masks), want)
    contexts = {k: ContextParallel(None, ShardPlan.build(list(masks.values()), 1), m) for k, m in masks.items()}
    assert_close(outcome(make("gemma3", integration.NAME), context=contexts), want)
    with pytest.raises(ValueError, match=r'no entry for this layer: it needs "sliding_attention"'):
        outcome(make("gemma3", integration.NAME), flashmask={"full_attention": MASK})


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss"])
def test_a_context_equals_eager(family):
    """Softcap and sinks included; a context for each kind of layer where there are two."""
    masks = {"full_attention": MASK, "sliding_attention": MASK & builders.sliding_window(N, WINDOW)}
    plan = ShardPlan.build(list(masks.values()), 1)
    contexts = {kind: ContextParallel(None, plan, mask) for kind, mask in masks.items()}
    one = contexts["full_attention"] if FAMILIES[family][2] == (None,) * 3 else contexts
    assert_close(outcome(make(family, integration.NAME), context=one), eager(family))


def test_a_context_whose_mask_has_the_window_already():
    narrow = MASK & builders.sliding_window(N, WINDOW)
    context = ContextParallel(None, ShardPlan.build(narrow, 1), narrow)
    assert_close(outcome(make("mistral", integration.NAME), context=context), eager("mistral"))
    wide = ContextParallel(None, ShardPlan.build(MASK, 1), MASK)
    with pytest.raises(ValueError, match=f"sliding_window={WINDOW}, and the mask of context= shows tokens outside it"):
        outcome(make("mistral", integration.NAME), context=wide)


def flattened(**options):
    features = [{"input_ids": TOKENS[0, OWNER.index(d) :][:n].tolist()} for d, n in enumerate(LENGTHS)]
    return DataCollatorWithFlattening(**options)(features, return_tensors="pt")


@pytest.mark.parametrize("positions", [True, False])
def test_the_batch_of_a_flattening_collator(positions):
    """transformers' collator, whose position_ids or cu_seq_lens tell the documents, with a loss."""
    batch = flattened(return_position_ids=positions, return_flash_attn_kwargs=True)
    batch.setdefault("position_ids", torch.arange(N)[None])
    got = make("llama", integration.NAME)(**batch).loss
    labels, place = batch["labels"], batch["position_ids"]
    mask = dense("llama", VISIBLE)
    want = make("llama", "eager")(batch["input_ids"], labels=labels, position_ids=place, attention_mask=mask).loss
    assert torch.allclose(got, want, rtol=1e-6)


def test_the_batch_of_trl():
    """What trl 1.16's DataCollatorForLanguageModeling(padding_free=True, pad_to_multiple_of=8) returns: padding is
    position 0 again and again, each a document of its own."""
    pad = 3
    positions = torch.cat([POSITIONS[0], torch.zeros(pad, dtype=torch.long)])[None]
    starts = (positions[0] == 0).nonzero().flatten()
    boundaries = torch.cat([starts, torch.tensor([N + pad])]).to(torch.int32)
    tokens = torch.nn.functional.pad(TOKENS[:1], (0, pad))
    labels = torch.nn.functional.pad(TOKENS[:1], (0, pad), value=-100)
    labels[positions == 0] = -100
    batch = {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": positions,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 42,
        "max_length_k": 42,
        "seq_idx": (positions[0] == 0).cumsum(0)[None].int() - 1,
    }
    got = make("llama", integration.NAME)(**batch, use_cache=False).loss
    separate = [
        torch.nn.functional.cross_entropy(
            make("llama", "eager")(part, use_cache=False).logits[0, :-1], part[0, 1:], reduction="sum"
        )
        for part in TOKENS[:1].split(LENGTHS, 1)
    ]
    assert torch.allclose(got, sum(separate) / (N - len(LENGTHS)), rtol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_generation_equals_eager(family):
    """A batch with left padding: prefill, then one token after the other from the cache."""
    prompts = TOKENS[:, :15]
    real = torch.ones(2, 15, dtype=torch.long)
    real[0, :4] = 0
    options = {"attention_mask": real, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None}
    want = make(family, "eager").eval().generate(prompts, **options)
    got = make(family, integration.NAME).eval().generate(prompts, **options)
    assert torch.equal(got.sequences, want.sequences)
    for mine, exact in zip(got.logits, want.logits, strict=True):
        assert (mine - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_with_a_static_cache(family):
    prompts = TOKENS[:, :15]
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    options |= {"attention_mask": torch.ones(2, 15, dtype=torch.long), "eos_token_id": None}
    want = make(family, "eager").eval().generate(prompts, **options)
    assert torch.equal(make(family, integration.NAME).eval().generate(prompts, **options), want)


def test_a_packed_prompt_cannot_be_continued():
    model = make("llama", integration.NAME).eval()
    first = model(TOKENS, position_ids=POSITIONS, use_cache=True)
    with pytest.raises(ValueError, match="position_ids restart although 1 queries meet 64 keys from a cache"):
        model(TOKENS[:, :1], position_ids=torch.full((2, 1), 42), past_key_values=first.past_key_values)


def test_lora():
    peft = pytest.importorskip("peft")

    def adapted(implementation):
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        torch.manual_seed(3)
        model = peft.get_peft_model(make("llama", implementation), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, 0, 0.3)
        return model

    def trained(model, **keywords):
        model(TOKENS, position_ids=POSITIONS, use_cache=False, labels=TOKENS, **keywords).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    got = trained(adapted(integration.NAME), flashmask=MASK)
    assert got and all("lora" in name for name in got)
    assert_close(got, trained(adapted("eager"), attention_mask=dense("llama", VISIBLE)))


@pytest.mark.parametrize(
    "backend, family, given",
    [
        ("aot_eager", "llama", "positions"),
        ("aot_eager", "gemma3", "flashmask"),
        pytest.param(
            *("inductor", "llama", "flashmask"),
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU"),
            ],
        ),
    ],
)
def test_compiled(backend, family, given, tmp_path, monkeypatch):
    """Forward and backward. In one graph where the mask is given; a mask to be found breaks it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    changes = {"num_hidden_layers": 1} if family == "llama" else {}
    masks = {"full_attention": MASK, "sliding_attention": MASK & builders.sliding_window(N, WINDOW)}
    mask = {"flashmask": masks} if given == "flashmask" else {}
    compiled = torch.compile(make(family, integration.NAME, **changes), backend=backend, fullgraph=given == "flashmask")
    got = {name.removeprefix("_orig_mod."): x for name, x in outcome(compiled, **mask).items()}
    assert_close(got, outcome(make(family, "eager", **changes), attention_mask=dense(family, VISIBLE)))


def test_mask_is_built_once_for_all_layers(monkeypatch):
    built = []
    original = FlashMask.from_position_ids.__func__
    monkeypatch.setattr(
        FlashMask, "from_position_ids", classmethod(lambda cls, *a, **k: built.append(1) or original(cls, *a, **k))
    )
    outcome(make("gemma3", integration.NAME))
    assert len(built) == 2  # one for each kind of layer


SHARED = builders.shared_question([[30, 20, 13]])
SHARED_POSITIONS = torch.cat([torch.arange(50), torch.arange(30, 43)]).expand(2, -1)


def test_shared_question_in_full_layers_and_not_in_sliding_ones():
    ends = {**dict.fromkeys(range(30), 63), **dict.fromkeys(range(30, 50), 50), **dict.fromkeys(range(50, 63), 63)}
    visible = torch.tensor([[c <= r < ends[c] for c in range(63)] for r in range(63)])[None]
    want = eager("llama", visible, position_ids=SHARED_POSITIONS)
    assert_close(outcome(make("llama", integration.NAME), position_ids=SHARED_POSITIONS, flashmask=SHARED), want)
    with pytest.raises(ValueError, match="a window of positions is not a window of rows"):
        outcome(make("mistral", integration.NAME), position_ids=SHARED_POSITIONS, flashmask=SHARED)


CONTEXT = ContextParallel(None, ShardPlan.build(MASK, 1), MASK)


@pytest.mark.parametrize(
    "family, changes, keywords, message",
    [
        ("llama", {}, {"flashmask": MASK, "context": CONTEXT}, "got both"),
        ("llama", {"attention_dropout": 0.1}, {"flashmask": MASK}, "attention dropout 0.1 is not supported"),
        ("llama", {}, {"attention_mask": VISIBLE.expand(2, 1, N, N)}, r"attention_mask \[2, 1, 63, 63\] is dense"),
        ("llama", {}, {"context": CONTEXT, "attention_mask": torch.arange(N).expand(2, -1) > 3}, "hides tokens"),
        ("llama", {}, {"flashmask": MASK, "attention_bias": 30.0}, "passes attention_bias"),
        ("llama", {}, {"flashmask": FlashMask.from_lengths([N + 1])}, "flashmask has 64 rows x 64 columns"),
        (
            "llama",
            {},
            {"flashmask": MASK.to_dense()},
            "flashmask must be a FlashMask, or .*, got Tensor",
        ),
        ("llama", {}, {"flashmask": MASK.to("meta")}, "the mask is on meta but q is on cpu"),
        ("llama", {"is_causal": False}, {}, "attention that is not causal"),
        ("gemma3", {"use_bidirectional_attention": True}, {}, "not a causal, sliding-window or packed one"),
        ("llama", {}, {"cu_seq_lens_q": torch.tensor([0, 3, N]), "cu_seq_lens_k": torch.tensor([0, 4, N])}, "differ"),
    ],
)
def test_refuses(family, changes, keywords, message):
    with pytest.raises(ValueError, match=message):
        outcome(make(family, integration.NAME, **changes), **keywords)


def test_a_part_that_tells_no_mask_is_refused():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="does not know the mask of Linear"):
        integration.attention(torch.nn.Linear(1, 1), q, q, q, None)


def test_a_window_is_not_compared_with_a_context_that_splits_heads():
    with pytest.raises(ValueError, match=r"sliding_window=9, which cannot be compared .* head parallelism"):
        layer._check_window(SimpleNamespace(members=2), WINDOW)


def test_sinks_of_the_wrong_number_are_refused():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"must be \[2\], got \[4\]"):
        integration.attention(torch.nn.Linear(1, 1), q, q, q, None, flashmask=builders.causal(4), s_aux=torch.zeros(4))


def test_every_family_has_a_sliding_layer_or_none():
    assert {name: any(FAMILIES[name][2]) for name in ("llama", "mistral", "gemma2", "gpt-oss")} == {
        "llama": False,
        "mistral": True,
        "gemma2": True,
        "gpt-oss": True,
    }
    model = make("qwen3-sliding", "eager")
    assert tuple(layer.self_attn.sliding_window for layer in model.model.layers) == FAMILIES["qwen3-sliding"][2]
