"""The loader: who reads what, what a mask and a plan ride along with, and resuming at the exact sample."""

import pytest
import torch

from fm_longctx.data import (
    IGNORED,
    ByteTokenizer,
    Loader,
    PackedSequence,
    PackedStream,
    TextFiles,
    TokenizedTexts,
)
from fm_longctx.mask import builders


@pytest.fixture
def stream(tmp_path):
    for i, size in enumerate([5, 40, 7, 300, 3, 128, 64]):
        (tmp_path / f"{i}.txt").write_bytes(bytes((i * 31 + j) % 256 for j in range(size)))
    documents = TokenizedTexts(TextFiles.from_path(tmp_path), ByteTokenizer())
    return PackedStream(documents, sequence_length=111, seed=3)


@pytest.fixture
def make(stream):
    made = []

    def loader(**options):
        made.append(Loader(stream, **options))
        return made[-1]

    yield loader
    for each in made:
        each.close()


def take(loader, n):
    return [next(loader) for _ in range(n)]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_data_ranks_read_all_sequences_once(make, dp_size):
    ranks = [make(batch_size=2, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    read = [i for _ in range(3) for r in ranks for i in next(r).sequences]
    assert read == list(range(6 * dp_size))


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_context_ranks_share_a_sequence(make, stream, cp_size):
    options = {"batch_size": 2, "cp_size": cp_size, "plan_options": {"chunk_size": 16}}
    batches = [next(make(cp_rank=r, **options)) for r in range(cp_size)]
    whole = [stream.sequence(i) for i in range(2)]
    plan = batches[0].plan
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(
            plan.unshard([getattr(b, name) for b in batches], 1), torch.stack([getattr(p, name) for p in whole])
        )
    assert {b.plan.fingerprint() for b in batches} == {plan.fingerprint()}
    assert sum(int((b.labels != IGNORED).sum()) for b in batches) == batches[0].num_labels
    assert [b.local.rank for b in batches] == list(range(cp_size))


def test_mask_is_causal_within_documents(make, stream):
    batch = next(make(batch_size=2))
    for i, dense in enumerate(batch.mask.to_dense()[:, 0]):
        document = [d for d, n in enumerate(stream.sequence(i).lengths) for _ in range(n)]
        words = [[r >= c and document[r] == document[c] for c in range(111)] for r in range(111)]
        assert dense.tolist() == words
    assert batch.visible_area == int(batch.mask.to_dense().sum())
    assert batch.num_scores == 2 * 111 * 111
    assert batch.num_tokens == 222


def test_resume_is_exact_whatever_was_prefetched(make):
    straight = take(make(), 7)
    first = make()
    take(first, 3)
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    for a, b in zip(straight[3:], take(resumed, 4), strict=True):
        assert a.sequences == b.sequences
        assert torch.equal(a.tokens, b.tokens)
    # A loader that is under way drops what it has prefetched.
    first.load_state_dict({**first.state_dict(), "next_sequence": 0})
    assert torch.equal(next(first).tokens, straight[0].tokens)


def test_resume_on_other_numbers_of_ranks(make):
    """The same sequences in the same order, whether cp or dp changed."""
    old = [make(dp_rank=r, dp_size=2) for r in range(2)]
    for loader in old:
        take(loader, 2)
    assert old[0].state_dict() == old[1].state_dict()
    for dp_size, cp_size in [(2, 2), (1, 3), (4, 1)]:
        ranks = [make(dp_rank=r, dp_size=dp_size, cp_size=cp_size) for r in range(dp_size)]
        for loader in ranks:
            loader.load_state_dict(old[0].state_dict())
        assert [i for r in ranks for i in next(r).sequences] == list(range(4, 4 + dp_size))


def test_state_of_other_data_is_refused(make, stream):
    state = make().state_dict()
    other = Loader(PackedStream(stream.documents, sequence_length=112, seed=3))
    with pytest.raises(ValueError, match="belongs to other data"):
        other.load_state_dict(state)
    other.close()


class Answers:
    """Sequences with masks of any kind and a value for each token: what tasks other than pretraining pack."""

    sequence_length = 12

    def sequence(self, index):
        # Shared questions have one interval, windowed documents two, and the prefix mask is not causal.
        mask = (
            builders.shared_question([[3, 2, 2], [1, 4]]),
            builders.causal_document([5, 7]) & builders.sliding_window(12, 3),
            builders.prefix_lm_document([2, 10], [1, 4]),
        )[index % 3]
        tokens = torch.arange(12) + 100 * index
        return PackedSequence(
            tokens=tokens,
            labels=tokens + 1,
            positions=torch.arange(12),
            mask=mask,
            lengths=(12,),
            extra={"weight": torch.linspace(0, index, 12)},
        )

    def fingerprint(self):
        return "answers"


def test_any_masks_and_further_values_share_a_batch():
    stream = Answers()
    whole = [stream.sequence(i) for i in range(3)]
    loaders = [Loader(stream, batch_size=3, cp_rank=r, cp_size=2) for r in range(2)]
    batches = [next(loader) for loader in loaders]
    assert torch.equal(batches[0].mask.to_dense(), torch.cat([p.mask.to_dense() for p in whole]))
    weights = batches[0].plan.unshard([b.extra["weight"] for b in batches], 1)
    assert torch.equal(weights, torch.stack([p.extra["weight"] for p in whole]))
    assert batches[0].visible_area == sum(int(p.mask.area()) for p in whole)
    assert batches[0].to(torch.device("cpu")).extra.keys() == {"weight"}
    for loader in loaders:
        loader.close()


def test_balance_counts_any_mask():
    """A stream without areas is measured by its masks."""
    loaders = [Loader(Answers(), dp_rank=r, dp_size=2, balance="area", lookahead=6) for r in range(2)]
    for _ in range(3):
        kinds = [next(loader).sequences[0] % 3 for loader in loaders]
        assert kinds[0] == kinds[1]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("workers, prefetch", [(1, 0), (3, 5)])
def test_workers_and_prefetching_change_nothing(make, workers, prefetch):
    options = {"batch_size": 2, "balance": "area", "lookahead": 8, "accumulation": 2}
    want = take(make(**options), 9)
    loader = make(workers=workers, prefetch=prefetch, **options)
    for i, batch in enumerate(take(loader, 9)):
        assert batch.sequences == want[i].sequences and torch.equal(batch.tokens, want[i].tokens)
    assert len(loader._ahead) == prefetch


def test_an_error_in_the_thread_reaches_the_step(make, stream):
    loader = make()
    source = stream.documents.source
    (source.root / source.names[0]).unlink()
    with pytest.raises(ValueError, match="cannot read document"):
        take(loader, 20)


def test_ranks_out_of_range(stream):
    with pytest.raises(ValueError, match="cp_rank must be in"):
        Loader(stream, cp_rank=2, cp_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        Loader(stream, batch_size=0)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Loader(stream, workers=0)


def test_a_stream_is_told_what_is_no_longer_needed(stream):
    """And never too much: what is being made ahead, or waits in the look-ahead, is still there."""
    released = []

    class Telling:
        sequence_length, fingerprint = stream.sequence_length, stream.fingerprint

        def sequence(self, index):
            assert not released or index >= max(released)
            return stream.sequence(index)

        def release(self, index):
            released.append(index)

    loader = Loader(Telling(), dp_size=2, balance="area", lookahead=8, workers=3, prefetch=5)
    take(loader, 12)
    loader.close()
    assert released == sorted(released) and released[-1] == 24
