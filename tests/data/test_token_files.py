"""Tokens in Megatron's form: we read what megatron-core writes, it reads what we write; what is broken is refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from fm_longctx.data import ByteTokenizer, TextFiles, TokenFiles, TokenizedTexts
from fm_longctx.data.prepare import prepare, prepare_stream
from fm_longctx.data.token_files import write_index

SIZES = [3, 40, 1, 300, 0, 128]


def texts(folder):
    return TextFiles.from_path(folder, pattern="*.txt"), ByteTokenizer()


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate(SIZES):
        (tmp_path / f"{i}.txt").write_bytes(bytes((i * 31 + j) % 256 for j in range(size)))
    return tmp_path


def contents(files):
    return [files.tokens(i, 0, int(n)).tolist() for i, n in enumerate(files.counts)]


def test_prepared_tokens_are_the_texts(folder):
    made = prepare(partial(texts, folder), folder / "out")
    source = TokenizedTexts(*texts(folder))
    files = TokenFiles.from_path(folder / "out", tokenizer=ByteTokenizer(), vocab_size=258)
    assert files.counts.tolist() == source.counts.tolist()
    assert contents(files) == contents(source)
    assert files.tokens(3, 5, 9).tolist() == source.tokens(3, 5, 9).tolist()
    assert (made.documents, made.tokens, made.dtype) == (5, sum(files.counts), "uint16")
    said = json.loads((folder / "out.json").read_text())
    assert said["source"] == source.source.fingerprint() and said["tokens"] == made.tokens
    assert sorted(p.name for p in folder.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def test_processes_write_what_one_writes(folder):
    prepare(partial(texts, folder), folder / "one")
    prepare(partial(texts, folder), folder / "two", workers=2)
    for ending in ("bin", "idx", "json"):
        assert (folder / f"one.{ending}").read_bytes() == (folder / f"two.{ending}").read_bytes()


def test_a_stream_writes_the_same_tokens(folder):
    source, tokenizer = texts(folder)
    prepare(partial(texts, folder), folder / "one")
    prepare_stream((source.read(i) for i in range(len(source))), "its name", tokenizer, folder / "two")
    assert (folder / "one.bin").read_bytes() == (folder / "two.bin").read_bytes()
    assert (folder / "one.idx").read_bytes() == (folder / "two.idx").read_bytes()


def test_megatron_reads_what_we_write(folder):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prepare(partial(texts, folder), folder / "out")
    files = TokenFiles.from_path(folder / "out")
    theirs = megatron.IndexedDataset(str(folder / "out"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == contents(files)
    assert theirs.document_indices.tolist() == list(range(len(files.counts) + 1))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint8])
def test_we_read_what_megatron_writes(tmp_path, dtype):
    """With several sequences (sentences) in a document; a document is all of them."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[[1, 2, 3], [4]], [[5, 6]], [], [[7], [8], [9, 10]]]
    for name in ("b", "a"):
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for sentences in documents:
            for sentence in sentences:
                builder.add_item(torch.tensor(sentence))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    whole = [[t for sentence in sentences for t in sentence] for sentences in documents]
    for path in ("a", "a.bin", "b.idx"):
        assert contents(TokenFiles.from_path(tmp_path / path)) == whole
    both = TokenFiles.from_path(tmp_path)
    assert contents(both) == whole * 2
    assert TokenFiles.from_path(tmp_path / "a").fingerprint() == TokenFiles.from_path(tmp_path / "b").fingerprint()
    assert both.fingerprint() != TokenFiles.from_path(tmp_path / "a").fingerprint()


def test_another_tokenizer_is_refused(folder):
    class Other(ByteTokenizer):
        def fingerprint(self):
            return "other"

    prepare(partial(texts, folder), folder / "out")
    with pytest.raises(ValueError, match=r"was made with another tokenizer: .*'bytes'.*Set data\.tokenizer"):
        TokenFiles.from_path(folder / "out", tokenizer=Other())


def test_a_token_outside_the_vocabulary(folder):
    prepare(partial(texts, folder), folder / "out")
    files = TokenFiles.from_path(folder / "out", vocab_size=257)
    assert files.tokens(0, 0, 3).tolist() == [256, 0, 1]
    with pytest.raises(ValueError, match="document 0, holds token 257, outside the model's vocabulary of 257"):
        files.tokens(0, 0, 5)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def patch(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda p: (p / "out.idx").unlink(), "out.idx does not exist"),
        (lambda p: (p / "out.bin").unlink(), "out.bin does not exist"),
        (lambda p: cut(p / "out.bin", 100), "out.bin has 100 bytes and its index says 964"),
        (lambda p: cut(p / "out.idx", 20), "is no index: it has 20 bytes"),
        (lambda p: cut(p / "out.idx", 80), "it is damaged"),
        (lambda p: patch(p / "out.idx", 0, b"X"), "no Megatron index of version 1"),
        (lambda p: patch(p / "out.idx", 9, b"\2"), "no Megatron index of version 1"),
        (lambda p: patch(p / "out.idx", 17, b"\7"), "dtype code 7 is none of whole numbers"),
        (lambda p: patch(p / "out.idx", 34, b"\1"), "do not lie one after the other"),
        (lambda p: patch(p / "out.idx", 34 + 5 * 12, b"\1"), "make no sense"),
        (lambda p: (p / "out.json").write_text("{"), "cannot read .*out.json"),
        (lambda p: (p / "out.idx").write_bytes((p / "out.idx").read_bytes() + bytes(5)), "multimodal"),
    ],
)
def test_damaged_files_are_refused(folder, break_it, message):
    prepare(partial(texts, folder), folder / "out")
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        TokenFiles.from_path(folder / "out")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.idx file"):
        TokenFiles.from_path(tmp_path)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31"):
        write_index(tmp_path / "a.idx", np.array([2**31]), np.uint16)


def test_what_is_there_stays_unless_told(folder):
    prepare(partial(texts, folder), folder / "out")
    before = (folder / "out.idx").read_bytes()
    with pytest.raises(ValueError, match=r"exists already\. .* --replace"):
        prepare(partial(texts, folder), folder / "out")
    (folder / "6.txt").write_text("more")
    prepare(partial(texts, folder), folder / "out", replace=True)
    assert (folder / "out.idx").read_bytes() != before


class Failing(ByteTokenizer):
    def encode(self, text):
        if len(text) == 128:
            raise ValueError("a bad text")
        return super().encode(text)


def test_a_failure_leaves_nothing_behind(folder):
    source = texts(folder)[0]
    with pytest.raises(ValueError, match="a bad text"):
        prepare(lambda: (source, Failing()), folder / "out")
    assert not list(folder.glob("out*"))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        prepare(lambda: (source, Failing()), folder / "out", workers=0)
