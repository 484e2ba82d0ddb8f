"""Every kind of source, packed either way, balanced or not: a loader goes on at the exact sample, on any ranks."""

import json
from functools import partial

import pytest
import torch

from fm_longctx.data import (
    ByteTokenizer,
    DatasetFeed,
    DatasetTexts,
    FeedStream,
    JsonLines,
    Loader,
    PackedStream,
    TextFiles,
    TokenFiles,
    TokenizedTexts,
)
from fm_longctx.data.prepare import prepare

SOURCES = ["files", "jsonl", "datasets", "tokens", "stream"]


def files(folder):
    return TextFiles.from_path(folder / "files"), ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same nine texts in every form."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "files").mkdir()
    texts = [f"{i} " + "word " * (i * i % 13 * 3) for i in range(9)]
    for i, text in enumerate(texts):
        (folder / "files" / f"{i}.txt").write_text(text)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(partial(files, folder), folder / "tokens")
    return folder


@pytest.fixture
def make_stream(folder, tmp_path, monkeypatch):
    def make(source, packing):
        options = dict(sequence_length=64, seed=3, packing=packing, window=3)
        if source in ("datasets", "stream"):
            datasets = pytest.importorskip("datasets")
            datasets.disable_progress_bars()
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        if source == "stream":
            return FeedStream(DatasetFeed.from_path(folder / "a.jsonl"), ByteTokenizer(), **options)
        if source == "tokens":
            return PackedStream(TokenFiles.from_path(folder / "tokens"), **options)
        texts = {
            "files": lambda: TextFiles.from_path(folder / "files"),
            "jsonl": lambda: JsonLines.from_path(folder / "a.jsonl"),
            "datasets": lambda: DatasetTexts.from_path(folder / "a.jsonl"),
        }[source]()
        return PackedStream(TokenizedTexts(texts, ByteTokenizer()), **options)

    return make


def run(make, ranks, batches, state=None, **options):
    """`batches` of each of the data ranks, and the state after them, through JSON as a checkpoint keeps it."""
    taken, states = [[] for _ in range(batches)], []
    for rank in range(ranks):
        loader = Loader(make(), dp_rank=rank, dp_size=ranks, **options)
        if state is not None:
            loader.load_state_dict(state)
        for i in range(batches):
            taken[i].append(next(loader))
        states.append(json.loads(json.dumps(loader.state_dict())))
        loader.close()
    assert all(s == states[0] for s in states)
    return taken, states[0]


def sequences(taken):
    return [i for batch in taken for rank in batch for i in rank.sequences]


@pytest.mark.parametrize("balance", ["none", "area"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("source", SOURCES)
def test_goes_on_at_the_exact_sample(make_stream, source, packing, balance):
    make = partial(make_stream, source, packing)
    options = {"batch_size": 2, "accumulation": 2, "balance": balance, "workers": 2, "prefetch": 3}
    if balance == "area":
        options["lookahead"] = 13
    straight, _ = run(make, 2, 6, **options)
    first, state = run(make, 2, 3, **options)
    second, _ = run(make, 2, 3, state, **options)
    for a, b in zip(straight, first + second, strict=True):
        for mine, want in zip(a, b, strict=True):
            assert mine.sequences == want.sequences
            for name in ("tokens", "labels", "positions"):
                assert torch.equal(getattr(mine, name), getattr(want, name))
            assert mine.mask.fingerprint() == want.mask.fingerprint()
    # On other ranks: every sequence once, and the same content under the same number.
    third, after = run(make, 3, 4, state, batch_size=1, balance=balance, lookahead=7 if balance == "area" else None)
    taken = sequences(first) + sequences(third)
    assert len(taken) == len(set(taken))
    assert set(taken) | set(after["pending"]) == set(range(after["next_sequence"]))
    known = {i: rank for batch in straight for rank in batch for i in rank.sequences}
    shared = 0
    for batch in third:
        for rank in batch:
            (index,) = rank.sequences
            if index in known:
                row = known[index].sequences.index(index)
                assert torch.equal(rank.tokens[0], known[index].tokens[row])
                shared += 1
    assert shared > 3


def test_every_source_gives_the_same_sequences(make_stream):
    """Files, lines, rows and tokens of the same texts in the same order are the same data."""
    for packing in ("concat", "best_fit"):
        first, *others = (make_stream(source, packing) for source in SOURCES if source != "stream")
        for other in others:
            for i in range(12):
                assert torch.equal(first.sequence(i).tokens, other.sequence(i).tokens)


def test_a_state_of_other_packing_is_refused(make_stream):
    _, state = run(partial(make_stream, "files", "concat"), 1, 1)
    loader = Loader(make_stream("files", "best_fit"))
    with pytest.raises(ValueError, match=r"belongs to other data: .* data\.packing"):
        loader.load_state_dict(state)
    loader.close()
