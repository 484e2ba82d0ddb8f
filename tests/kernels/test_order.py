"""In which order the Hopper kernels take the lists of all heads. Plain arithmetic, so it runs anywhere."""

import heapq
import itertools
from collections import OrderedDict

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from fm_longctx.kernels.hopper.backward import _from_end
from fm_longctx.kernels.hopper.launch import rounds, schedules_needed
from fm_longctx.kernels.hopper.primitives import place_of, round_of
from fm_longctx.mask import builders

PROCESSORS = 132


@pytest.fixture(autouse=True)
def plain_functions(monkeypatch):
    """What `_from_end` calls, as Python."""
    monkeypatch.setitem(_from_end.fn.__globals__, "round_of", round_of.fn)


@pytest.mark.parametrize("shared", [1, 2, 8])
@pytest.mark.parametrize("blocks", [1, 7, 64, 90, 128, 256, 1024])
@pytest.mark.parametrize("heads", [8, 16, 48])
def test_every_list_once_and_heads_in_groups(blocks, heads, shared):
    abreast, last, _ = rounds(blocks, heads, shared, PROCESSORS)
    items = [place_of.fn(item, blocks, heads, abreast, last) for item in range(blocks * heads)]
    assert len(set(items)) == blocks * heads
    assert {place for place, _ in items} == set(range(blocks)) and {head for _, head in items} == set(range(heads))
    assert abreast % shared == last % shared == 0 and 0 < last <= min(heads, abreast)
    bounds = [*range(0, heads - last, abreast), heads - last, heads]
    for begin, end in itertools.pairwise(bounds):
        group = items[begin * blocks : end * blocks]
        assert group == [(place, head) for place in range(blocks) for head in range(begin, end)]


def walk(blocks, heads, order, turns, *, held):
    """A causal backward by count: (part of the processors' time that is used, part of the visits that miss a cache).

    Lists of 1 to `blocks` row-blocks, the longest first, each taken by whichever processor is free first; the cache
    holds the last `held` of them that anyone visited, each of one head.
    """
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    waiting = iter(range(blocks * heads))
    free = [(0.0, processor, -1, iter(())) for processor in range(PROCESSORS)]
    end, missed, visits = 0.0, 0, 0
    while free:
        now, processor, head, rows = heapq.heappop(free)
        row = next(rows, None)
        if row is None:
            item = next(waiting, None)
            if item is not None:
                place, head = place_of.fn(item, blocks, heads, order.abreast, order.last)
                back = _from_end.fn(place, head, blocks // 2, blocks, blocks, order.abreast, turns)
                rows = iter(range(blocks - 1, place - 1, -1) if back else range(place, blocks))
                heapq.heappush(free, (now, processor, head, rows))
            continue
        visits += 1
        missed += (head, row) not in cache
        cache[head, row] = None
        cache.move_to_end((head, row))
        if len(cache) > held:
            cache.popitem(last=False)
        end = now + 1
        heapq.heappush(free, (end, processor, head, rows))
    return visits / PROCESSORS / end, missed / visits


@pytest.mark.parametrize("blocks, heads", [(32, 8), (64, 8), (64, 4), (128, 8), (256, 4)])
def test_processors_work_to_the_end_and_on_the_same_rows(blocks, heads):
    """8 query heads a key/value head, D 128: Q, dO and the sum of dQ of 128 rows are 1 MB."""
    order = rounds(blocks, heads, 1, PROCESSORS)
    used, missed = walk(blocks, heads, order, order.turns, held=40)
    assert used > 0.97 and missed < 0.1, (used, missed)


def test_lists_of_all_lengths_are_walked_from_their_end():
    assert not _from_end.fn(0, 1, 64, 128, 128, 1, 1)
    assert _from_end.fn(0, 1, 32, 128, 128, 1, 1)
    assert not _from_end.fn(200, 0, 32, 128, 256, 1, 2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_schedules_that_passes_read(deterministic):
    """The forward's block depends on the mask at D 64; the pass for dQ alone keeps its own and runs if it must."""

    def needed(d, mask, *, backward=True):
        q, k = torch.empty(1, 256, 4, d, device="meta"), torch.empty(1, 256, 2, d, device="meta")
        return schedules_needed(q, k, mask, backward=backward, deterministic=deterministic)

    causal, documents = builders.causal(256), builders.causal_document([100, 156])
    assert needed(64, causal, backward=False) == [(192, 128, True)]
    assert needed(64, documents, backward=False) == needed(128, causal, backward=False) == [(128, 128, True)]
    by_row = [(128, 128, True)] if deterministic else []
    for mask in (causal, documents):
        assert needed(64, mask) == [(128, 128, False), *by_row]
        assert needed(128, mask) == [(64, 128, False), *by_row]
