"""Packing: nothing lost, nothing invented, and no label that crosses documents."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fm_longctx import flashmask_attention
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


@pytest.mark.parametrize("length, window", [(63, 1), (63, 4), (111, 2), (1000, 3)])
def test_best_fit_is_every_document_once_an_epoch(texts, length, window):
    stream = stream_of(texts, length, packing="best_fit", window=window)
    want = sorted(((i, t) for i, size in enumerate(texts[1]) for t in range(size + 2)))
    # Whole windows until they end with an epoch: after `length * window` epochs at the latest.
    seen, index, bookmark = [], 0, {}
    while len(seen) < 3 * len(want) or len(seen) % len(want):
        bookmark = stream.bookmark(index)
        while stream.bookmark(index) == bookmark:
            seen += [(p.document, t) for p in stream.layout.pieces(index) for t in range(p.start, p.stop)]
            index += 1
    assert sorted(seen) == sorted(want * (len(seen) // len(want)))


@pytest.mark.parametrize("length", [63, 200])
def test_best_fit_cuts_only_what_is_longer_than_a_sequence(texts, length):
    stream = stream_of(texts, length, packing="best_fit", window=4)
    for index in range(20):
        packed = stream.sequence(index)
        assert packed.tokens.shape == (length,)
        for piece in stream.layout.pieces(index):
            count = stream.documents.counts[piece.document]
            assert piece.length == min(count, length) or (count > length and piece.start % length == 0)
        assert packed.num_padding == length - sum(packed.lengths)
        # Padding has no label, and each padding token sees itself and is seen by nothing else.
        used = length - packed.num_padding
        assert (packed.labels[used:] == IGNORED).all() and (packed.positions[used:] == 0).all()
        dense = packed.mask.to_dense()[0, 0]
        assert torch.equal(dense[used:], torch.eye(length, dtype=torch.bool)[used:])
        assert torch.equal(dense[:, used:], torch.eye(length, dtype=torch.bool)[:, used:])
        begin = 0
        for n in packed.lengths:
            part = packed.tokens[begin : begin + n].tolist()
            assert packed.labels[begin : begin + n].tolist() == [*part[1:], IGNORED]
            assert len({t for t in part if t < 256}) <= 1
            begin += n


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_area_is_known_before_the_text_is_read(texts, packing):
    stream = stream_of(texts, 111, packing=packing, window=3)
    for index in range(15):
        assert stream.area(index) == int(stream.sequence(index).mask.area())


def test_sequences_of_a_window_are_shuffled(texts):
    """Best fit makes the longest first; a run must not see them so."""
    lengths = [stream_of(texts, 63, seed, packing="best_fit", window=8).sequence(0).lengths for seed in range(8)]
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_bookmark_leads_to_the_same_sequences(texts, packing):
    stream = stream_of(texts, 63, packing=packing, window=2)
    want = [stream.sequence(i).tokens.tolist() for i in range(40)]
    for index in (0, 1, 17, 39):
        other = stream_of(texts, 63, packing=packing, window=2)
        other.restore(stream.bookmark(index))
        assert other.sequence(index).tokens.tolist() == want[index]
        # What lies before it can still be had.
        assert [other.sequence(i).tokens.tolist() for i in (index // 2, 39)] == [want[index // 2], want[39]]
        assert other.bookmark(index) == stream.bookmark(index)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_nothing_leaks_from_one_document_to_another(tmp_path, packing):
    """Change one document: no loss of any other token changes, by a single bit."""
    sizes = [20, 9, 31, 14, 25]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(bytes(65 + i + 7 * (j % 3) for j in range(size)))
    stream = stream_of((tmp_path,), 60, packing=packing, window=2)
    before = {i: losses(stream.sequence(i)) for i in range(4)}
    pieces = {i: stream.layout.pieces(i) for i in range(4)}
    (tmp_path / "2.txt").write_bytes(b"Z" * 31)
    stream = stream_of((tmp_path,), 60, packing=packing, window=2)
    changed = 0
    for i, old in before.items():
        new, begin = losses(stream.sequence(i)), 0
        for piece in pieces[i]:
            part = slice(begin, begin + piece.length)
            if piece.document == 2:
                changed += int((new[part] != old[part]).sum())
            else:
                assert torch.equal(new[part], old[part]), (i, piece)
            begin += piece.length
        assert torch.equal(new[begin:], old[begin:]) and (old[begin:] == 0).all()
    assert changed > 20


def losses(packed):
    """Loss of each token under one layer of attention with the sequence's own mask; 0 where nothing is predicted."""
    generator = torch.Generator().manual_seed(0)
    table, positions = torch.randn((258, 16), generator=generator), torch.randn((60, 16), generator=generator)
    x = (table[packed.tokens] + positions[packed.positions])[None, :, None]
    out = flashmask_attention(x, x, x, packed.mask)[0, :, 0]
    return F.cross_entropy(out @ table.T, packed.labels, reduction="none", ignore_index=IGNORED)


def test_what_is_refused(texts):
    with pytest.raises(ValueError, match="packing must be concat or best_fit, got 'first_fit'"):
        stream_of(texts, packing="first_fit")
    with pytest.raises(ValueError, match="window must be at least 1"):
        stream_of(texts, packing="best_fit", window=0)
