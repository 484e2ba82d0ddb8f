"""The next batch's copy to a GPU: what is asked of CUDA, in which order and on which stream, by a stand-in for it."""

from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import pytest
import torch

from fm_longctx.data import ByteTokenizer, Loader, PackedStream, TextFiles, TokenizedTexts
from fm_longctx.mask import FlashMask

DEVICE = torch.device("cuda", 0)


class Cuda:
    """Streams and events by name, and a log of what was asked."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.to = [], "main", torch.Tensor.to
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        self.pinned = []
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: self.pin(x))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: any(x is p for p in self.pinned))
        monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **options: self.copy(x, *args, **options))
        monkeypatch.setattr(FlashMask, "to", lambda mask, device: self.copy_mask(mask, device))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.log.append(("lent", x)))

    @contextmanager
    def on(self, device):
        yield

    @contextmanager
    def within(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def record(self, stream):
        self.log.append(("event", stream))

    def wait_event(self, event):
        self.log.append(("wait", self.current))

    def pin(self, x):
        self.pinned.append(x.clone())
        return self.pinned[-1]

    def copy(self, x, *args, **options):
        if DEVICE not in args:
            return self.to(x, *args, **options)
        assert options == {"non_blocking": True} and any(x is p for p in self.pinned)
        self.log.append(("copy", self.current))
        return x.clone()

    def copy_mask(self, mask, device):
        if device != DEVICE:
            return mask
        starts, ends = (x.to(device, non_blocking=True) for x in (mask.starts, mask.ends))
        return FlashMask.from_canonical(starts, ends, causal=mask.causal, num_rows=mask.num_rows)


def tensors_of(x):
    """Every tensor inside, but the rows and the plan, which stay on the CPU."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, FlashMask):
        return [x.starts, x.ends]
    if isinstance(x, dict):
        return [t for value in x.values() for t in tensors_of(value)]
    if isinstance(x, tuple):
        return [t for value in x for t in tensors_of(value)]
    if is_dataclass(x):
        return [t for f in fields(x) if f.name not in ("rows", "plan", "ahead") for t in tensors_of(getattr(x, f.name))]
    return []


@pytest.fixture
def loaded(tmp_path):
    (tmp_path / "text.txt").write_text("many words of one document " * 60)
    documents = TokenizedTexts(TextFiles.from_path(tmp_path), ByteTokenizer(), cache=tmp_path / "cache")
    loaders = []

    def make(**options):
        stream = PackedStream(documents, sequence_length=96, seed=0)
        loaders.append(Loader(stream, cp_rank=1, cp_size=3, plan_options={"num_stages": 3}, prefetch=0, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def test_a_batch_is_copied_when_it_is_made_and_waited_for_when_it_is_used(monkeypatch, loaded):
    plain = next(loaded())
    cuda = Cuda(monkeypatch)
    batch = next(loaded(copy_to=DEVICE))
    count = len(tensors_of(batch))
    assert count == 3 + 2 + 3 * 6
    made = cuda.log[: count + 1]
    assert made == [("copy", "side")] * count + [("event", "side")]
    del cuda.log[:]

    here = batch.to(DEVICE)
    assert cuda.log[0] == ("wait", "main")
    lent = [x for what, x in cuda.log[1:] if what == "lent"]
    moved = tensors_of(here)
    assert len(lent) == len(moved) == count and all(any(x is y for y in lent) for x in moved)
    for before, after in zip(tensors_of(plain), moved, strict=True):
        assert after.equal(before) and after is not before
    assert here.local.rows.equal(plain.local.rows) and here.num_labels == plain.num_labels
    assert here.local.fingerprint == plain.local.fingerprint


def test_a_batch_without_a_copy_moves_as_it_is(loaded):
    batch = next(loaded())
    here = batch.to(torch.device("cpu"))
    assert batch.ahead is None and here.ahead is None
    for before, after in zip(tensors_of(batch), tensors_of(here), strict=True):
        assert after.equal(before)
