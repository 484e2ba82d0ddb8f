"""The attention benchmark: its parts against their definitions, and every section end to end on a CPU."""

import dataclasses
import itertools
import json
import math
import sys
import types
from unittest.mock import patch

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import attention, peers, timing, warm
from benchmarks.attention_check import dense
from benchmarks.cells import PAPER_CASES, PRESETS, Cell, Scenario, Sizes, scenario, section_cells
from benchmarks.mask_mods import block_mask, block_mask_bytes, empty_block_mask
from benchmarks.peers import Inputs, Peer, Run, Settings, competitors, hidden_like, make_inputs
from benchmarks.race import race
from benchmarks.records import Records, read
from benchmarks.sampled_check import errors, expected
from benchmarks.sparsity import band_of_blocks, document_lengths_at
from benchmarks.warm import Job, compile_job, jobs, shared_inputs

ABOUT = {"date": "2026-01-01", "device": "CPU", "torch": "2", "triton": "3", "cuda": "none", "python": "3"}
ABOUT |= {"commit": "abc", "command": "python"}


def cell(case="causal_document", section="cases", **changes):
    return Cell(**{"section": section, "case": case, "n": 96, "d": 16, "heads": 4, "kv_heads": 2, "batch": 2} | changes)


# Masks


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [*PAPER_CASES, "pack", "causal_document@50", "causal_document@85"])
def test_every_form_of_a_mask_is_its_rule_in_words(name, seed):
    n = 203
    forms = scenario(name, n, seed)
    r, j = torch.arange(n, dtype=torch.int32)[:, None], torch.arange(n, dtype=torch.int32)[None, :]
    words = forms.case.visible(r, j).expand(n, n)
    assert torch.equal(forms.case.mask.to_dense()[0, 0], words)
    mask_mod, zero = forms.mask_mod("cpu"), torch.zeros((), dtype=torch.int32)
    if mask_mod is None:
        assert words.all()
    else:
        assert torch.equal(mask_mod(zero, zero, r, j).expand(n, n), words)
    if forms.plain:
        assert torch.equal(words, torch.ones(n, n, dtype=torch.bool) if forms.plain == "full" else (j <= r))
    if forms.documents:
        lengths, causal = forms.documents
        blocks = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()
        assert torch.equal(words, blocks & (j <= r) if causal else blocks)
    if forms.window:
        assert torch.equal(words, (j <= r) & (j > r - forms.window))


def test_the_forms_that_peers_take_are_offered_for_the_masks_that_have_them():
    forms = {name: scenario(name, 203, 0) for name in PAPER_CASES}
    assert [name for name in forms if forms[name].plain] == ["full", "causal"]
    assert [name for name in forms if forms[name].documents] == ["causal_document", "document"]
    assert [name for name in forms if forms[name].window] == ["sliding_window"]


@pytest.mark.parametrize("percent", [0, 30, 100])
def test_a_band_of_blocks_is_its_rule_and_its_function(percent):
    n = 256
    forms = scenario(f"band_of_blocks@{percent}", n, 0)
    r, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    words = forms.case.visible(r, j)
    assert torch.equal(forms.case.mask.to_dense()[0, 0], words)
    assert torch.equal(forms.mask_mod("cpu")(r, r, r, j), words)


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 100])
def test_a_band_of_blocks_has_the_sparsity_asked_for_evenly(percent):
    block, blocks = 32, 20
    mask = band_of_blocks(block * blocks, percent, block).mask
    assert mask.sparsity(block) == pytest.approx(percent / 100)
    tiles = mask.to_dense()[0, 0].unflatten(0, (blocks, block)).unflatten(2, (blocks, block)).float().mean((1, 3))
    assert set(tiles.unique().tolist()) <= {0.0, 1.0}
    for axis in (0, 1):
        assert (tiles.sum(axis) == blocks * (100 - percent) / 100).all()


@pytest.mark.parametrize("percent", [50, 60, 70, 80, 90, 95, 99])
def test_documents_have_the_sparsity_asked_for(percent):
    n = 32768
    lengths = document_lengths_at(n, percent)
    assert sum(lengths) == n and min(lengths) > 0 and len(set(lengths)) <= 2
    area = sum(length * (length + 1) // 2 for length in lengths)
    assert 100 * (1 - area / n**2) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("percent", [-1, 49, 100])
def test_documents_cannot_have_any_sparsity(percent):
    with pytest.raises(ValueError, match="50%"):
        document_lengths_at(1024, percent)


@pytest.mark.parametrize("n", [512, 700])
@pytest.mark.parametrize("name", ["causal", "document", "global_sliding_window", "random_eviction"])
def test_a_block_mask_is_what_create_block_mask_makes(name, n):
    mask_mod = scenario(name, n, 0).mask_mod("cpu")
    ours, theirs = block_mask(mask_mod, n, "cpu"), create_block_mask(mask_mod, None, None, n, n, device="cpu")
    tables = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    tables += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    for table in tables:
        assert torch.equal(getattr(ours, table), getattr(theirs, table)), table
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert block_mask_bytes(n) == sum(getattr(theirs, table).numel() * 4 for table in tables)
    empty = empty_block_mask(mask_mod, n, "cpu")
    for table in tables:
        assert getattr(empty, table).shape == getattr(theirs, table).shape
        assert getattr(empty, table).dtype == getattr(theirs, table).dtype
    assert not empty.kv_num_blocks.any() and not empty.full_q_num_blocks.any()


def test_a_block_that_hides_one_score_is_partial():
    made = block_mask(lambda b, h, q, kv: (q != 130) | (kv != 7), 384, "cpu")
    assert made.kv_num_blocks.tolist() == [[[0, 1, 0]]] and made.full_kv_num_blocks.tolist() == [[[3, 2, 3]]]
    assert made.kv_indices[0, 0, 1, 0] == 0


@pytest.mark.parametrize("name", PAPER_CASES)
def test_the_mask_that_compiles_has_the_real_ones_form_and_hides_everything(name):
    real = scenario(name, 96, 0).case.mask
    hidden = hidden_like(real)
    assert (hidden.causal, hidden.num_intervals, hidden.num_rows) == (real.causal, real.num_intervals, real.num_rows)
    assert hidden.starts.dtype == real.starts.dtype and hidden.starts.shape == real.starts.shape
    assert not hidden.to_dense().any() if real.num_intervals else hidden is real


def test_the_72_cells():
    cells = section_cells("cases", Sizes())
    assert len({c.key for c in cells}) == 72
    assert {(c.n * c.batch, c.heads * c.d, c.kv_heads == c.heads) for c in cells} == {(131072, 4096, True)}


# Right and wrong results


@pytest.mark.parametrize("name", ["full", "shared_question", "prefix_lm_document"])
def test_sampled_rows_and_columns_are_those_of_the_whole(name):
    q, k, v, dout = make_inputs(cell(name), "cpu")
    rule = scenario(name, 96, 0).case.visible
    want = expected(q, k, v, dout, rule, samples=40)
    out, _, dq, dk, dv = dense(q[-1:], k[-1:], v[-1:], dout[-1:], rule, torch.float32)
    whole = {"out": out[0, want.rows, -1], "dq": dq[0, want.rows, -1]}
    whole |= {"dk": dk[0, want.columns, -1], "dv": dv[0, want.columns, -1]}
    for part, (value, budget) in want.parts.items():
        assert (value - whole[part]).abs().max() <= 1e-5
        assert 0 < budget < 1e-4
    assert want.rows.min() == 0 and want.rows.max() == 95


def test_a_wrong_result_is_seen():
    q, k, v, dout = make_inputs(cell(), "cpu")
    rule = scenario("causal_document", 96, 0).case.visible
    want = expected(q, k, v, dout, rule)

    def gradients(rule):
        parts = [dense(q[i : i + 1], k[i : i + 1], v[i : i + 1], dout[i : i + 1], rule, torch.float32) for i in (0, 1)]
        return [torch.cat([part[i] for part in parts]) for i in (0, 2, 3, 4)]

    out, *right = gradients(rule)
    assert max(errors(want, out, tuple(right)).values()) <= 1
    other, *wrong = gradients(lambda r, j: j <= r)
    assert min(errors(want, other, tuple(wrong)).values()) > 1
    assert errors(want, out * 1.001, None)["out"] > 1
    for i, name in enumerate(("dq", "dk", "dv")):
        broken = [x.clone() for x in right]
        broken[i][-1, :, -1] = math.nan
        found = errors(want, out, tuple(broken))
        assert [part for part, ratio in found.items() if not ratio <= 1] == [name]


def test_one_competitor_fails_and_one_is_wrong_and_the_others_are_timed():
    good = competitors(["reference", "dense", "cudnn"], Settings())

    def broken(inputs: Inputs, forms: Scenario) -> Run:
        raise RuntimeError("no kernel\nfor this")

    def wrong(inputs: Inputs, forms: Scenario) -> Run:
        run = good[0].prepare(inputs, forms)
        return run._replace(forward=lambda: run.forward() * 1.01)

    allow = lambda cell, forms, device: None  # noqa: E731
    peers = [Peer(name="broken", refusal=allow, prepare=broken), Peer(name="wrong", refusal=allow, prepare=wrong)]
    rows = {row["competitor"]: row for row in race(cell(), [*peers, *good], "cpu", timing.Timer("cpu", budget_ms=0))}
    assert {name: row["status"] for name, row in rows.items()} == {
        "broken": "failed",
        "wrong": "wrong",
        "reference": "ok",
        "dense": "ok",
        "cudnn": "refused",
    }
    assert "no kernel" in rows["broken"]["note"] and "out" in rows["wrong"]["note"]
    assert "forward_ms" not in rows["wrong"] and rows["dense"]["backward_ms"] > 0
    assert rows["dense"]["area"] == int(scenario("causal_document", 96, 0).case.visible(*grid(96)).sum())


def test_what_breaks_while_all_are_timed_is_in_all_their_rows():
    (good,) = competitors(["reference"], Settings())

    def tires(inputs: Inputs, forms: Scenario) -> Run:
        run = good.prepare(inputs, forms)
        left = [run.forward, run.forward]
        return run._replace(forward=lambda: left.pop()())

    peer = Peer(name="tires", refusal=lambda cell, forms, device: None, prepare=tires)
    heard: list[str] = []
    rows = list(race(cell(), [good, peer], "cpu", timing.Timer("cpu", budget_ms=0), heard.append))
    assert heard == ["reference", "tires"]
    assert [(row["competitor"], row["status"]) for row in rows] == [("reference", "failed"), ("tires", "failed")]
    assert all("while all were timed: IndexError" in row["note"] for row in rows)


def grid(n):
    return torch.arange(n)[:, None], torch.arange(n)[None, :]


@pytest.mark.parametrize("name", ["full", "causal", "sliding_window", "causal_document", "document"])
def test_flash_attention_4_is_asked_for_the_mask(name, monkeypatch):
    """As its interface says: window_size counts keys before and after the row's own, cu_seqlens begin at 0."""

    def attend(q, k, v, causal, window_size=(None, None)):
        r, j = grid(q.shape[1])
        before, after = window_size
        seen = (j <= r) if causal else torch.ones_like(j <= r)
        if before is not None:
            seen = (r - j <= before) & (j - r <= after)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2), torch.empty(0)

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        ends = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32 and ends == cu_seqlens_k.tolist()
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(ends))
        documents = ((x[a:b][None] for x in (q, k, v)) for a, b in itertools.pairwise(ends))
        return torch.cat([attend(*document, causal)[0][0] for document in documents]), torch.empty(0)

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_func, module.flash_attn_varlen_func = attend, varlen
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    (peer,) = competitors(["fa4"], Settings())
    anywhere = dataclasses.replace(peer, refusal=lambda cell, forms, device: None)
    (row,) = race(cell(name), [anywhere], "cpu", timing.Timer("cpu", budget_ms=0))
    assert row["status"] == "ok", row


def test_flash_attention_4_is_refused_where_it_has_no_such_mask_or_is_missing():
    (peer,) = competitors(["fa4"], Settings())
    assert "masks only" in peer.refusal(cell("qk_sparse"), scenario("qk_sparse", 96, 0), "cuda")
    assert "GPU" in peer.refusal(cell("causal"), scenario("causal", 96, 0), "cpu")
    with patch.object(peers, "find_spec", return_value=None):
        assert "not installed" in peer.refusal(cell("causal"), scenario("causal", 96, 0), "cuda")


def test_no_n_by_n_mask_beyond_the_limit():
    (peer,) = competitors(["dense"], Settings(dense_limit=64))
    assert "64" in peer.refusal(cell(), scenario("full", 96, 0), "cpu")
    assert peer.refusal(cell(n=64), scenario("causal_document", 64, 0), "cpu") is None
    assert "causal_document" in peer.refusal(cell("full", n=64), scenario("full", 64, 0), "cpu")


def test_an_unknown_competitor_is_named():
    with pytest.raises(ValueError, match="'fa3'"):
        competitors(["reference", "fa3"], Settings())


# What is compiled beforehand


def test_compiling_runs_without_trouble_and_tells_of_it():
    names = ("reference", "flex", "cudnn")
    assert compile_job(Job(cells=(cell("qk_sparse"), cell("full")), names=names), Settings(), "cpu") == []
    (trouble,) = compile_job(Job(cells=(cell(d=8, kv_heads=3),), names=("flex",)), Settings(), "cpu")
    assert trouble.startswith("cases/causal_document/") and "flex: ValueError" in trouble


def test_what_is_to_be_measured_is_loaded_once_and_its_trouble_told(monkeypatch):
    loaded = []

    def missing():
        loaded.append("fa4")
        raise ImportError("no libcute")

    peer = Peer(name="fa4", refusal=lambda cell, forms, device: None, prepare=None, load=missing)
    monkeypatch.setattr(warm, "competitors", lambda names, settings: [peer] if names else [])
    job = Job(cells=(cell(),), names=(), loads=("fa4",))
    assert [trouble.split(", ")[1] for trouble in compile_job(job, Settings(), "cpu")] == [
        "fa4: ImportError: no libcute"
    ]
    assert loaded == ["fa4"]


def test_each_kernel_and_each_graph_is_compiled_once():
    names = ["hopper", "triton", "flex", "cudnn", "flash", "dense", "fa4"]
    found = jobs([(c, names) for c in section_cells("cases", Sizes(lengths=(96, 192), head_dims=(64,), tokens=192))])
    shared, kept = [job for job in found if not job.keeps], [job for job in found if job.keeps]
    assert found == shared + kept
    # Full, causal, and one interval causal, two, one: each for both lengths; FlashAttention-4 once a mask.
    for ours in ("hopper", "triton"):
        kinds = [job for job in shared if job.names == (ours,)]
        assert len(kinds) == 5 and all([c.n for c in job.cells] == [96, 192] for job in kinds)
    assert [len(job.cells) for job in shared if job.names == ("fa4",)] == [1] * 12
    assert len({job.cells[0].compilation for job in kept}) == len(kept) == 24
    assert {job.names for job in kept} == {("flex", "cudnn")} and {job.loads for job in kept} == {("fa4",)}

    # One compilation for all sparsities; memory and schedule run no FlexAttention, the schedule no backward.
    bands = [(c, names) for c in section_cells("sparsity", Sizes(sparsity_length=4096, tokens=4096))]
    assert sum(job.keeps for job in jobs(bands)) == 2
    rest = [(c, names) for s in ("memory", "schedule") for c in section_cells(s, PRESETS["smoke"])]
    assert {(job.names, job.backward, len(job.cells)) for job in jobs(rest)} == {
        ((ours,), backward, 2) for ours in ("hopper", "triton") for backward in (True, False)
    }
    assert jobs([(c, ["flex"]) for c, _ in bands[:1]])[0].names == ("flex",)


def test_what_was_compiled_for_a_hidden_mask_serves_the_real_one():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    attend = torch.compile(flex_attention, backend=backend, dynamic=False, fullgraph=True)
    one, forms = cell("shared_question", kv_heads=4), scenario("shared_question", 96, 0)
    for inputs, make in (
        (shared_inputs(one, "cpu", heads_first=True), empty_block_mask),
        (make_inputs(one, "cpu"), block_mask),
    ):
        leaves, _ = peers._heads_first(inputs)
        attend(*(x.detach() for x in leaves), block_mask=make(forms.mask_mod("cpu"), 96, "cpu"))
    assert len(graphs) == 1
    assert inputs.q.shape == shared_inputs(one, "cpu", heads_first=False).q.shape


# Time


class Clock:
    """Stands still but for what the calls take; those beyond the list take as long as its last."""

    def __init__(self, *durations_ms):
        self.now, self.durations, self.calls = 0.0, durations_ms, 0

    def perf_counter(self):
        return self.now

    def call(self):
        self.now += self.durations[min(self.calls, len(self.durations) - 1)] / 1e3
        self.calls += 1


@pytest.mark.parametrize(
    ("durations", "median", "calls"),
    [
        ((5000, 10), 10, 2 + 8),  # compiles, then fits the budget eight times
        ((5000, 100, 104), 104, 3),  # one call is over the budget: three in all, the compiling one left out
        ((5, 0.1), 0.1, 2 + 50),  # never more than 50
        ((50, 40, 44, 41, 47), 44, 2 + 3),  # never fewer than three
    ],
)
def test_the_budget_is_spent_and_the_first_call_left_out(durations, median, calls):
    clock = Clock(*durations)
    with patch.object(timing, "time", clock):
        result = timing.Timer("cpu", budget_ms=80)(clock.call)
    assert result.ms == pytest.approx(median) and clock.calls == calls


def test_calls_are_timed_in_turn_and_another_begins_each_round():
    calls: list[str] = []

    class Taking:
        """A clock by which a's calls take 30 ms and b's 20."""

        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Taking()

    def call(name, ms):
        calls.append(name)
        clock.now += ms / 1e3

    functions = [lambda: call("a", 30), lambda: call("b", 20)]
    with patch.object(timing, "time", clock):
        a, b = timing.Timer("cpu", budget_ms=80).in_turn(functions, [900, 900])
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "b"
    assert (a.reps, b.reps) == (3, 4) and (a.ms, b.ms) == (pytest.approx(30), pytest.approx(20))


def test_a_long_call_runs_twice_and_the_second_counts():
    clock = Clock(5000, 410, 1000)
    with patch.object(timing, "time", clock):
        result = timing.Timer("cpu", long_ms=400)(clock.call)
    assert (result.ms, result.reps, clock.calls) == (pytest.approx(410), 1, 2)


def test_fewer_than_three_repetitions_are_refused():
    with pytest.raises(ValueError, match="3 or more"):
        timing.Timer("cpu", least=2)


# End to end


@pytest.fixture
def own_caches(monkeypatch, tmp_path):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in (*names, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    arguments = ["--cache", str(tmp_path / "cache"), "--commit", "abc", "--date", "2026-01-01", "--out", str(tmp_path)]
    with torch._functorch.config.patch(donated_buffer=True):  # as it was, afterwards
        yield arguments


def test_every_section_runs_on_a_cpu(own_caches, tmp_path, capsys):
    attention.main(["--smoke", *own_caches])
    path = tmp_path / "2026-01-01-attention.jsonl"
    rows = read(path)
    sections = {section: section_cells(section, PRESETS["smoke"]) for section in attention.SECTIONS}
    for section, cells in sections.items():
        found = {(row["key"], row["competitor"]) for row in rows if row["section"] == section}
        ours = {"reference"} if section == "schedule" else {"reference", "flex"}
        assert {(c.key, name) for c in cells for name in ours} <= found
    assert {row["status"] for row in rows if row["competitor"] in ("reference", "flex")} == {"ok"}
    assert {row["status"] for row in rows if row["case"] == "causal_document"} >= {"ok", "refused"}
    assert all(row["device"].startswith("CPU") for row in rows)
    for section in attention.SECTIONS:
        assert (tmp_path / f"2026-01-01-attention-{section}.png").stat().st_size > 1000
    page = (tmp_path / "2026-01-01-attention.md").read_text()
    assert page.count("\n## ") == 6 and "| reference | dense | backward | 1 |" in page
    assert (tmp_path / "2026-01-01-attention.csv").read_text().count("\n") == len(rows) + 1

    before = path.read_text()
    capsys.readouterr()
    attention.main(["--smoke", *own_caches])
    assert path.read_text() == before
    assert "ok      forward" not in capsys.readouterr().out
    attention.main(["--report", str(path)])
    assert capsys.readouterr().out.strip() == page.strip()


def test_a_time_limit_leaves_the_rest_for_the_next_run(own_caches, tmp_path, capsys):
    arguments = ["--smoke", "--sections", "4", *own_caches]
    attention.main([*arguments, "--limit", "0"])
    assert "stopped at --limit, 2 cells to go" in capsys.readouterr().out
    assert not (tmp_path / "2026-01-01-attention.jsonl").exists()
    attention.main([*arguments, "--warm", "1"])
    assert len((tmp_path / "2026-01-01-attention.jsonl").read_text().splitlines()) == 2
    assert "seconds: start and compiling" in capsys.readouterr().out


def test_options():
    options = attention.parse(["--sections", "1", "packs", "--lengths", "8192", "--head-dims", "64"])
    assert options.sections == ["cases", "packs"] and str(options.out) == "benchmarks/results"
    sizes = attention.chosen_sizes(options)
    assert (sizes.lengths, sizes.head_dims, sizes.tokens) == ((8192,), (64,), 131072)
    assert attention.names_of("packs", options) == ["hopper", "triton", "flex", "fa4"]
    options = attention.parse(["--competitors", "triton", "flex_tuned"])
    assert attention.names_of("packs", options) == ["triton", "flex_tuned"]
    assert attention.names_of("memory", options) == ["triton"]
    assert attention.parse(["--smoke"]).out.name.startswith("smoke_")
    for misspelt in (["--sections", "6"], ["--competitors", "fa3"], ["--cases", "documents"]):
        with pytest.raises(SystemExit):
            attention.parse(misspelt)


def test_rows_are_json(tmp_path):
    records = Records(tmp_path / "rows.jsonl", ABOUT)
    records.add(cell(), {"competitor": "flex", "status": "ok", "forward_ms": 1.5})
    assert json.loads(records.path.read_text())["forward_ms"] == 1.5
