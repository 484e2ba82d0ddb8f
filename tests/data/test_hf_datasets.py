"""Hugging Face datasets: local files of several formats, in any order or streamed."""

import itertools
import json

import pytest

from fm_longctx.data import DatasetFeed, DatasetTexts

datasets = pytest.importorskip("datasets")

TEXTS = [f"text {i}" for i in range(11)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """Two files of each format."""
    for i, part in enumerate((TEXTS[:6], TEXTS[6:])):
        rows = datasets.Dataset.from_dict({"text": part, "id": list(range(len(part)))})
        for name in ("jsonl", "parquet", "txt"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "jsonl" / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
        rows.to_parquet(str(tmp_path / "parquet" / f"{i}.parquet"))
        (tmp_path / "txt" / f"{i}.txt").write_text("\n".join(part) + "\n")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def some(feed, n):
    return [text.decode() for text in itertools.islice(feed_iterator(feed), n)]


def feed_iterator(feed):
    while True:
        yield next(feed)


@pytest.mark.parametrize("name", ["jsonl", "parquet", "txt", "saved"])
def test_local_files(folder, name):
    texts = DatasetTexts.from_path(folder / name)
    assert [texts.read(i).decode() for i in range(len(texts))] == TEXTS
    assert texts.num_bytes > 50
    assert texts.record(3)["text"] == "text 3"
    assert some(DatasetFeed.from_path(folder / name), 13) == [*TEXTS, "text 0", "text 1"]


def test_fingerprint_follows_files_and_field(folder):
    before = DatasetTexts.from_path(folder / "jsonl").fingerprint()
    assert DatasetTexts.from_path(folder / "jsonl").fingerprint() == before
    assert DatasetTexts.from_path(folder / "jsonl", field="id").fingerprint() != before
    assert DatasetTexts.from_path(folder / "parquet").fingerprint() != before


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_a_stream_goes_on_at_any_text(folder, name):
    """In another process's stream, over the end of a file and of an epoch."""
    feed = DatasetFeed.from_path(folder / name)
    want, states = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(feed.state())))
        want += some(feed, 1)
    assert want == (TEXTS * 3)[:25]
    for at in (0, 3, 6, 10, 11, 12, 22, 23):
        other = DatasetFeed.from_path(folder / name)
        other.restore(states[at])
        # A state that was only just restored is a state too.
        assert other.state() == states[at]
        assert some(other, 25 - at) == want[at:], at


def test_one_epoch(folder):
    feed = DatasetFeed.from_path(folder / "jsonl")
    some(feed, 3)
    assert [text.decode() for text in feed.once()] == TEXTS


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("nowhere", {}, "does not exist"),
        ("", {}, r"files of several formats \(json, parquet, arrow, text\)"),
        ("jsonl", {"format": "parquet"}, "holds no parquet file"),
        ("jsonl", {"field": "body"}, r"row 0 of .* has no text: it has the fields text"),
    ],
)
def test_what_is_refused(folder, path, options, message):
    with pytest.raises(ValueError, match=message):
        DatasetTexts.from_path(folder / path, **options).read(0)
    with pytest.raises(ValueError, match=message):
        next(DatasetFeed.from_path(folder / path, **options))


def test_an_empty_stream(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="has no row"):
        next(DatasetFeed.from_path(tmp_path))
