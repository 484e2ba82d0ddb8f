"""Texts as tokens: counts that are kept, tokenizers that do what they say."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fm_longctx.data import ByteTokenizer, HuggingFaceTokenizer, JsonLines, TextFiles, TokenizedTexts, documents
from tests.data import tokenizers

TEXTS = ["the cat", "and the hat " * 40, "", "naïve ✓", "the rat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizers.save(tmp_path_factory.mktemp("tokenizer"), max_length=4)


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return JsonLines.from_path(tmp_path)


def test_a_document_is_bos_text_eos_and_never_truncated(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    bos, eos = (tokenizer.describe()[name] for name in ("bos", "eos"))
    for text in TEXTS:
        tokens = tokenizer.encode(text.encode())
        assert (tokens[0], tokens[-1]) == (bos, eos) == (0, 1)
        assert tokenizer.decode(tokens) == text
        assert tokens.dtype == np.int64 and tokens.max() < tokenizer.vocab_size
    # Bytes that are no text do not stop a run.
    assert len(tokenizer.encode(b"\xff")) > 2


@pytest.mark.parametrize("bos, eos", [(False, None), (None, False), (False, False), (True, True)])
def test_bos_and_eos_as_asked(folder, bos, eos):
    tokens = HuggingFaceTokenizer(folder, add_bos=bos, add_eos=eos).encode(b"the cat").tolist()
    assert (tokens[0] == 0) == (bos is not False)
    assert (tokens[-1] == 1) == (eos is not False)


def test_a_tokenizer_without_bos(tmp_path):
    tokenizers.save(tmp_path, bos=None)
    assert HuggingFaceTokenizer(tmp_path).describe()["bos"] is None
    with pytest.raises(ValueError, match=r"data\.add_bos is true but the tokenizer in .* has no BOS"):
        HuggingFaceTokenizer(tmp_path, add_bos=True)


def test_fingerprint_follows_content_and_markers(folder, tmp_path):
    prints = {
        HuggingFaceTokenizer(folder).fingerprint(),
        HuggingFaceTokenizer(folder, add_bos=False).fingerprint(),
        HuggingFaceTokenizer(folder, add_eos=False).fingerprint(),
        ByteTokenizer().fingerprint(),
    }
    assert len(prints) == 4
    shutil.copytree(folder, tmp_path / "copy")
    assert HuggingFaceTokenizer(tmp_path / "copy").fingerprint() in prints
    # Trained with another special token.
    assert (
        HuggingFaceTokenizer(tokenizers.save(tmp_path, special=["<s>", "</s>", "<?>", "<unk>"])).fingerprint()
        not in prints
    )


def test_many_threads_at_once(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    want = [tokenizer.encode(text.encode()).tolist() for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda text: tokenizer.encode(text.encode()).tolist(), TEXTS * 40)
    assert list(got) == want * 40


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        HuggingFaceTokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="transformers cannot load a tokenizer from"):
        HuggingFaceTokenizer(tmp_path)


class Counting(ByteTokenizer):
    """Bytes, and how many texts were tokenized."""

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


def test_counts_are_tokens_and_kept(lines, tmp_path):
    want = [len(text.encode()) + 2 for text in TEXTS]
    first, second, third = Counting(), Counting(), Counting()
    assert TokenizedTexts(lines, first, cache=tmp_path / "cache").counts.tolist() == want
    assert TokenizedTexts(lines, second, cache=tmp_path / "cache").counts.tolist() == want
    assert (first.calls, second.calls) == (len(TEXTS), 0)
    assert TokenizedTexts(lines, third).counts.tolist() == want
    assert third.calls == len(TEXTS)


def test_sizes_of_files_are_counts_of_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    tokenizer = Counting()
    assert TokenizedTexts(TextFiles.from_path(tmp_path / "a.txt"), tokenizer).counts.tolist() == [5]
    assert tokenizer.calls == 0


def test_a_long_document_is_tokenized_once_for_all_its_pieces(lines):
    tokenizer = Counting()
    texts = TokenizedTexts(lines, tokenizer)
    tokenizer.calls = 0
    whole = np.concatenate([texts.tokens(1, i, i + 60) for i in range(0, 600, 60)])
    assert whole.tolist() == ByteTokenizer().encode(TEXTS[1].encode()).tolist()
    assert tokenizer.calls == 1


def test_a_text_that_changed_since_it_was_counted(lines, tmp_path):
    texts = TokenizedTexts(lines, ByteTokenizer())
    content = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(content.replace("the cat", "\\u00e9ca"))
    with pytest.raises(ValueError, match="document 0 has 6 tokens and had 9 when they were counted"):
        texts.tokens(0, 0, 1)


def test_large_text_is_announced_and_larger_refused(lines, monkeypatch, caplog):
    monkeypatch.setattr(documents, "SLOW_TO_COUNT", 10)
    TokenizedTexts(lines, ByteTokenizer())
    assert "launch/prepare_data.py" in caplog.text
    monkeypatch.setattr(documents, "TOO_LARGE_TO_COUNT", 10)
    with pytest.raises(ValueError, match="too much to tokenize at a run's start"):
        TokenizedTexts(lines, ByteTokenizer())
