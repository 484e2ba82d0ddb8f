"""Packing: nothing lost, nothing invented, and no label that crosses documents."""

import numpy as np
import pytest
import torch

from fm_longctx.data import IGNORED, ByteTokenizer, PackedStream, TextFiles, TokenizedTexts, assemble


@pytest.fixture
def texts(tmp_path):
    # Every document has a byte of its own, so a token tells which document it is from.
    sizes = [1, 40, 7, 300, 3, 128, 64]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * size)
    return tmp_path, sizes


def stream_of(texts, length=111, seed=3, **options):
    documents = TokenizedTexts(TextFiles.from_path(texts[0]), ByteTokenizer())
    return PackedStream(documents, sequence_length=length, seed=seed, **options)


def test_assemble():
    packed = assemble([np.array([256, 7, 8]), np.array([9]), np.array([10, 257])])
    assert packed.tokens.tolist() == [256, 7, 8, 9, 10, 257]
    assert packed.labels.tolist() == [7, 8, IGNORED, IGNORED, 257, IGNORED]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.lengths == (3, 1, 2)


@pytest.mark.parametrize("length", [2, 63, 111, 1000])
def test_an_epoch_is_every_document_once(texts, length):
    stream = stream_of(texts, length)
    total = sum(texts[1]) + 2 * len(texts[1])
    assert stream.epoch_tokens == total
    tokens = torch.cat([stream.sequence(i).tokens for i in range(-(-2 * total // length))]).tolist()
    for epoch in range(2):
        part = tokens[epoch * total : (epoch + 1) * total]
        documents, begin = [], 0
        for i, token in enumerate(part):
            if token == 257:
                documents.append(part[begin : i + 1])
                begin = i + 1
        assert begin == total
        assert sorted(documents) == sorted([256, *[65 + i] * size, 257] for i, size in enumerate(texts[1]))


def test_epochs_and_seeds_have_orders_of_their_own(texts):
    length = sum(texts[1]) + 2 * len(texts[1])
    first, second = (stream_of(texts, length).sequence(i).tokens.tolist() for i in (0, 1))
    other = stream_of(texts, length, seed=4).sequence(0).tokens.tolist()
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert stream_of(texts, length).sequence(0).tokens.tolist() == first


@pytest.mark.parametrize("length", [63, 111])
def test_labels_never_cross_documents(texts, length):
    stream = stream_of(texts, length)
    for index in range(12):
        packed = stream.sequence(index)
        assert sum(packed.lengths) == length
        begin = 0
        for piece in packed.lengths:
            part = slice(begin, begin + piece)
            tokens, labels = packed.tokens[part].tolist(), packed.labels[part].tolist()
            assert labels == [*tokens[1:], IGNORED]
            assert packed.positions[part].tolist() == list(range(piece))
            assert len({t for t in tokens if t < 256}) <= 1  # one document's byte only
            begin += piece


def test_a_long_document_is_split_at_the_sequence_boundary(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    stream = stream_of((tmp_path,), 40, 0)
    assert [stream.sequence(i).lengths for i in range(3)] == [(40,), (40,), (22, 18)]
    assert stream.sequence(1).tokens.tolist() == list(range(39, 79))
    assert stream.sequence(1).positions.tolist() == list(range(40))


def test_too_short(texts):
    with pytest.raises(ValueError, match="sequence_length must be at least 2"):
        stream_of(texts, 1)
