"""ShardPlan: what a layout must be for any mask, length and world size, by dense counting."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cases import cases
from benchmarks.packs import pack
from fm_longctx import FlashMask, ShardPlan
from fm_longctx.context_parallel import local
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.layout import chunk_grid
from fm_longctx.mask import builders
from tests.mask.oracle import dense_of_intervals, raw_masks

CASES = [case.name for case in cases(64)]
WORLD_SIZES = [1, 2, 3, 4, 5, 6, 7, 8]


def visible_by_rule(case, n):
    index = torch.arange(n)
    return case.visible(index[:, None], index[None, :])[None, None]


def check_layout(plan, n, world_size):
    rows = [plan.rows(rank) for rank in range(world_size)]
    assert torch.cat(rows).sort().values.equal(torch.arange(n))
    for r in rows:
        assert r.dtype == torch.int64 and r.device.type == "cpu"
        assert len(r) in (n // world_size, -(-n // world_size))
        assert (r[1:] > r[:-1]).all()
    return rows


def check_stages(plan, dense, mask=None):
    """Each visible score is in exactly one stage of its row's owner; nothing else is received; both ends agree."""
    world_size, n = plan.world_size, plan.num_tokens
    parts = [plan.local(rank, mask) for rank in range(world_size)]
    fractions = []
    for rank, part in enumerate(parts):
        rows = plan.rows(rank)
        assert part.rows.equal(rows) and len(part.stages) == plan.num_stages
        rebuilt = torch.zeros(*dense.shape[:2], len(rows), n, dtype=torch.int64)
        own = torch.zeros(n, dtype=torch.bool)
        own[rows] = True
        seen = dense[:, :, rows].flatten(0, 2).any(0)
        for s, stage in enumerate(part.stages):
            assert not stage.mask.causal and stage.mask.num_rows == len(rows)
            rebuilt[..., stage.columns] += stage.mask.to_dense().long()
            assert stage.area == int(stage.mask.area().sum())
            if s == 0:
                assert stage.columns.equal(rows) and stage.send_rows.numel() == 0 and sum(stage.receive_counts) == 0
                assert stage.area == 0 or plan.own_stage == 0
                continue
            assert seen[stage.columns].all()
            # Own keys are sent to itself in one stage, or in none.
            waits = plan.own_stage == s and plan.head_parallel == 1
            assert int(own[stage.columns].sum()) == (int((seen & own).sum()) if waits else 0)
            at = 0
            for source, count in enumerate(stage.receive_counts):
                theirs = parts[source].stages[s]
                begin = sum(theirs.send_counts[:rank])
                sent = theirs.send_rows[begin : begin + theirs.send_counts[rank]]
                assert plan.rows(source)[sent].equal(stage.columns[at : at + count])
                at += count
            assert at == len(stage.columns) and sum(stage.send_counts) == len(stage.send_rows)
        assert rebuilt.equal(dense[:, :, rows].long())
        elsewhere = n - len(rows)
        fractions.append(int((seen & ~own).sum()) / elsewhere if elsewhere else 0.0)
    return sum(fractions) / world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("n", [1, 2, 63, 101, 1_000, 10_000, 11_021])
def test_rows_partition_the_sequence(n, world_size):
    lengths = pack(n, seed=n)
    for mask in (builders.causal_document(lengths), builders.full(n)):
        for chunk_size in (None, 1_000 if n > 1_000 else 7):
            plan = ShardPlan.build(mask, world_size, chunk_size=chunk_size)
            assert plan.num_tokens == n
            check_layout(plan, n, world_size)


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_empty_sequence(world_size):
    plan = ShardPlan.build(builders.full(0), world_size)
    check_layout(plan, 0, world_size)
    assert plan.imbalance == 1.0 and plan.received_fraction == 0.0
    assert plan.local(0).stages[-1].columns.numel() == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3_000), st.integers(1, 70), st.integers(1, 500))
def test_chunk_grid(n, world_size, chunk_size):
    bounds, odd = chunk_grid(n, world_size, chunk_size)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == n and (sizes > 0).all() and len(odd) == len(sizes)
    share = n // world_size
    assert (sizes[~odd] == chunk_size).all() or share <= chunk_size
    # Whichever odd chunk a rank gets, with its part of the others it has floor or ceil of n / world_size.
    others = sizes[~odd].sum() / world_size
    assert all(int(others) + size in (share, share + 1) for size in sizes[odd])
    assert odd.sum() in (0, min(n, world_size))
    if share >= chunk_size:
        assert sizes.max() <= 1.5 * chunk_size + 1 and sizes.min() >= chunk_size // 2


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_covered_and_measured(name, world_size):
    n = 101
    case = next(case for case in cases(n, seed=2) if case.name == name)
    dense = visible_by_rule(case, n)
    plan = ShardPlan.build(case.mask, world_size, chunk_size=5)
    rows = check_layout(plan, n, world_size)
    areas = [int(dense[:, :, r].sum()) for r in rows]
    assert list(plan.areas) == areas
    assert plan.imbalance == pytest.approx(max(areas) * world_size / sum(areas))
    assert plan.received_fraction == pytest.approx(check_stages(plan, dense))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_intervals_are_covered(data):
    n, world_size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    num_stages = data.draw(st.integers(min(2, world_size), world_size))
    raw = data.draw(
        raw_masks(max_intervals=3, shape=(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), n, n))
    )
    mask = FlashMask(raw.starts, raw.ends, causal=raw.causal)
    dense = dense_of_intervals(raw)
    own_stage = data.draw(st.integers(0, int(world_size > 1)))
    plan = ShardPlan.build(mask, world_size, num_stages=num_stages, own_stage=own_stage)
    rows = check_layout(plan, n, world_size)
    assert list(plan.areas) == [int(dense[:, :, r].sum()) for r in rows]
    assert plan.received_fraction == pytest.approx(check_stages(plan, dense))


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
def test_stages_divide_the_remote_keys(num_stages):
    n, world_size = 101, 5
    plan = ShardPlan.build(builders.full(n), world_size, num_stages=num_stages)
    assert plan.num_stages == num_stages
    check_stages(plan, torch.ones(1, 1, n, n, dtype=torch.bool))
    for rank in range(world_size):
        stages = plan.local(rank).stages
        assert all(len(stage.columns) > 0 for stage in stages)
        if num_stages == world_size:
            # A ring: one source in each stage.
            assert [sum(count > 0 for count in stage.receive_counts) for stage in stages[1:]] == [1] * 4


@pytest.mark.parametrize("growth", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("num_stages", [3, 4])
def test_pairs_are_cut_by_the_same_shares(monkeypatch, num_stages, growth):
    """Both ends cut alike; every stage has its share of each pair's keys, but for the rounding."""
    monkeypatch.setattr(local, "_TILE", 1)
    world_size = 5
    mask = builders.causal_document([60, 41])
    plan = replace(ShardPlan.build(mask, world_size, num_stages=num_stages, chunk_size=4), growth=growth)
    check_stages(plan, mask.to_dense())
    shares = np.array([growth**s for s in range(num_stages - 1)])
    cut = 0
    for rank in range(world_size):
        counts = np.array([stage.receive_counts for stage in plan.local(rank).stages[1:]])
        for pair in counts.T[counts.sum(0) >= num_stages - 1]:
            assert np.abs(pair - pair.sum() * shares / shares.sum()).max() <= 1
            cut += 1
    assert cut > 5


@pytest.mark.parametrize("world_size, seed", [(8, 0), (16, 2)])
def test_stages_of_a_rank_have_their_share_of_its_bytes(monkeypatch, world_size, seed):
    plan = ShardPlan.build(builders.causal_document(pack(8_192 * world_size, seed)), world_size, num_stages=4)
    for rank in (0, world_size - 1):
        for stage in plan.local(rank).stages[1:-1]:
            # Whole tiles of each pair that is cut, the rest in the last stage.
            counts = np.array(stage.receive_counts)
            assert (counts[counts >= 3 * 128] % 128 == 0).all()
    monkeypatch.setattr(local, "_TILE", 1)
    report, shares = plan.report(), np.array([plan.growth**s for s in range(3)])
    for moved in (report.received[:, 1:], report.sent[:, 1:]):
        busy = moved[moved.sum(1) > moved.sum(1).mean() / 2]
        assert np.abs(busy / busy.sum(1, keepdims=True) / (shares / shares.sum()) - 1).max() < 0.1


def test_several_masks_share_a_layout():
    n, world_size = 101, 3
    full, window = builders.causal(n), builders.sliding_window(n, 9)
    plan = ShardPlan.build([full, window], world_size, chunk_size=4)
    dense = [mask.to_dense() for mask in (full, window)]
    rows = check_layout(plan, n, world_size)
    assert list(plan.areas) == [sum(int(d[:, :, r].sum()) for d in dense) for r in rows]
    assert plan.received_fraction == pytest.approx(
        (check_stages(plan, dense[0]) + check_stages(plan, dense[1], window)) / 2
    )
    # Layers with the window receive the window's keys only, and the layout is exact for a mask it was not made for.
    assert len(plan.local(0, window).stages[1].columns) < len(plan.local(0).stages[1].columns)
    other = builders.document([40, 61])
    check_stages(plan, other.to_dense(), other)


def test_local_mask_is_that_of_the_stage():
    mask = builders.document([20, 43])
    for own_stage in (0, 1):
        plan = ShardPlan.build(mask, 3, num_stages=3, own_stage=own_stage)
        part = plan.local(1)
        for stage in range(plan.num_stages):
            expected = mask.to_dense()[:, :, plan.rows(1)][..., part.stages[stage].columns]
            expected &= stage >= own_stage
            assert plan.local_mask(1, stage).to_dense().equal(expected)


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_shard_and_unshard(world_size):
    n = 101
    plan = ShardPlan.build(builders.causal(n), world_size)
    x = torch.randn(2, n, 3)
    shards = [plan.shard(x, rank, 1) for rank in range(world_size)]
    for rank, shard in enumerate(shards):
        assert shard.equal(x[:, plan.rows(rank)])
        assert plan.shard(x.transpose(1, 2), rank, -1).equal(shard.transpose(1, 2))
    assert plan.unshard(shards, 1).equal(x)
    with pytest.raises(ValueError, match="101 positions"):
        plan.shard(x, 0, 0)
    with pytest.raises(ValueError, match="one shard per rank"):
        plan.unshard(shards[:-1], 1)


def test_equal_arguments_give_equal_plans():
    lengths = pack(20_000, seed=1)
    plans = [ShardPlan.build(builders.causal_document(lengths), 7) for _ in range(2)]
    assert plans[0].fingerprint() == plans[1].fingerprint()
    assert plans[0].owners.equal(plans[1].owners) and plans[0].bounds.equal(plans[1].bounds)
    changed = [
        ShardPlan.build(builders.causal_document(lengths), 6),
        ShardPlan.build(builders.causal_document(lengths), 7, chunk_size=100),
        ShardPlan.build(builders.causal_document(lengths), 7, num_stages=5),
        ShardPlan.build(builders.causal_document([*lengths[:-1], lengths[-1] - 1, 1]), 7),
        replace(plans[0], own_stage=1 - plans[0].own_stage),
    ]
    assert len({plan.fingerprint() for plan in [plans[0], *changed]}) == 6


def test_a_plan_and_its_parts_travel_by_pickle():
    plan = ShardPlan.build([builders.causal(63), builders.full(63)], 4)
    plan.received_fraction  # noqa: B018
    again = pickle.loads(pickle.dumps(plan))
    assert again.fingerprint() == plan.fingerprint() and again.areas == plan.areas
    part, part_again = plan.local(2), pickle.loads(pickle.dumps(again.local(2)))
    assert part_again.fingerprint == part.fingerprint
    for a, b in zip(part.stages, part_again.stages, strict=True):
        assert a.columns.equal(b.columns) and a.mask.fingerprint() == b.mask.fingerprint()


def test_a_part_moves_through_pinned_memory(monkeypatch):
    """Nothing is pinned on the way to a CPU; on the way to a GPU everything is, once."""
    pinned = []

    def pin(x):
        pinned.append(x)
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: any(x.data_ptr() == p.data_ptr() for p in pinned))
    part = ShardPlan.build(builders.causal_document([50, 51]), 3).local(1)
    stage = part.stages[1].to("cpu")
    assert not pinned and stage.columns.equal(part.stages[1].columns)
    again = part.pin_memory()
    assert len(pinned) == 6 * len(part.stages)
    for old, new in zip(part.stages, again.stages, strict=True):
        assert new.mask.fingerprint() == old.mask.fingerprint() and new.send_rows.equal(old.send_rows)
        assert new.columns is not old.columns and new.area == old.area and new.send_counts == old.send_counts
    moved = []
    monkeypatch.setattr(type(stage), "pin_memory", lambda stage: moved.append(stage) or again.stages[1])
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x is again.stages[1].columns)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(FlashMask, "to", lambda mask, device: mask)
    assert part.stages[1].to("cuda").columns is again.stages[1].columns and moved == [part.stages[1]]


def test_fingerprint_of_a_part_names_the_mask():
    plan = ShardPlan.build([builders.causal(63), builders.full(63)], 4)
    assert plan.local(0).fingerprint == plan.local(3).fingerprint
    assert plan.local(0).fingerprint != plan.local(0, builders.full(63)).fingerprint


def test_planning_needs_neither_kernels_nor_collectives():
    code = (
        "import sys; from fm_longctx import ShardPlan; from fm_longctx.mask import builders;"
        "ShardPlan.build(builders.causal(64), 4).local(1);"
        "loaded = [m for m in sys.modules if m == 'triton' or m.startswith(('triton.', 'fm_longctx.kernels',"
        "'fm_longctx.attention', 'fm_longctx.context_parallel.exchange', 'fm_longctx.context_parallel.context'))];"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# Quality


@pytest.mark.parametrize("world_size, packs, imbalance, received", [(8, 20, 1.02, 0.25), (64, 2, 1.05, 0.16)])
def test_packs_are_balanced_with_a_fraction_of_the_traffic_of_an_all_gather(world_size, packs, imbalance, received):
    """8K tokens a rank, seeds from 0 on; benchmarks/planner.py has all 20 at both sizes."""
    n = world_size * 8_192
    plans = [ShardPlan.build(builders.causal_document(pack(n, seed)), world_size) for seed in range(packs)]
    assert max(plan.imbalance for plan in plans) <= imbalance
    assert np.mean([plan.received_fraction for plan in plans]) <= received
    # No rank sends much more than others receive: it would be the one that all wait for.
    for plan in plans if world_size == 64 else ():
        keys = plan.tables[0][1] * (1 - np.eye(world_size))
        assert keys.sum(0).max() <= 2.2 * keys.sum(0).mean()


@pytest.mark.parametrize("n", [8_192, 10_000, 11_021, 65_536])
def test_plain_causal_is_no_worse_than_the_zigzag_over_any_number_of_ranks(n):
    for world_size in (1, 2, 3, 5, 6, 7, 8, 12, 24, 64):
        balanced, zigzag = (ShardPlan.build(builders.causal(n), world_size, strategy=s) for s in ("balanced", "zigzag"))
        assert balanced.imbalance <= zigzag.imbalance + 1e-9, world_size
        assert balanced.received_fraction <= zigzag.received_fraction + 1e-9, world_size


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_plain_causal_is_no_worse_than_zigzag(world_size):
    n = 8_192
    plan = ShardPlan.build(builders.causal(n), world_size)
    half = n // (2 * world_size)
    piece = np.arange(n) // half
    owner = np.minimum(piece, 2 * world_size - 1 - piece)
    seen = np.array(
        [(np.flatnonzero(owner == rank)[-1] + 1 - n / world_size) / (n - n / world_size) for rank in range(world_size)]
    )
    area = np.bincount(owner, np.arange(1, n + 1), world_size)
    assert plan.imbalance <= area.max() / area.mean() + 1e-9
    assert plan.received_fraction <= seen.mean() + 1e-9


def test_a_sliding_window_stays_contiguous():
    n, world_size, window = 8_192, 8, 100
    plan = ShardPlan.build(builders.sliding_window(n, window), world_size)
    assert plan.imbalance < 1.02
    # Each rank but the first receives the window - 1 keys before its own.
    assert plan.received_fraction == pytest.approx(7 / 8 * (window - 1) / (n - n / 8))


def test_a_few_heavy_rows_get_smaller_chunks():
    plan = ShardPlan.build(builders.causal_blockwise([4_000] * 11 + [1_000]), 8)
    assert plan.imbalance <= 1.1


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [5, 101, 11_021])
def test_strategies_are_what_they_say(n, world_size):
    mask = builders.causal_document(pack(n, seed=1))
    rows = check_layout(ShardPlan.build(mask, world_size, strategy="contiguous"), n, world_size)
    assert torch.cat(rows).equal(torch.arange(n))
    plan = ShardPlan.build(mask, world_size, strategy="zigzag")
    rows = check_layout(plan, n, world_size)
    # At most two runs a rank, the second as far from the end as the first is from the start.
    for rank, r in enumerate(rows):
        breaks = np.flatnonzero(np.diff(r.numpy()) > 1)
        assert len(breaks) <= 1
        if len(r) > 1 and world_size > 1 and n > 100 and rank < world_size - 1:
            assert len(breaks) == 1
            assert abs(int(r[0]) - (n - 1 - int(r[-1]))) <= 2 * world_size
    if n < 1_000:
        check_stages(plan, mask.to_dense())


def test_the_cost_model_chooses_the_stages():
    mask = builders.document([131_072])
    links = [CostModel(bandwidth=bandwidth, host_ranks=1) for bandwidth in (5e9, 4.5e10, 3e12)]
    slow, usual, fast = (ShardPlan.build(mask, 8, cost=cost).staging for cost in links)
    assert 2 < slow.num_stages <= 8 and slow.own_stage == usual.own_stage == 0
    # Waiting for the keys costs less than merging once more.
    assert fast.num_stages == 2 and fast.own_stage == 1
    given = ShardPlan.build(mask, 8, num_stages=3, cost=links[2])
    assert given.num_stages == 3 and given.own_stage == 0
    assert ShardPlan.build(mask, 8, own_stage=0, cost=links[2]).own_stage == 0


def test_masks_count_by_their_weights():
    full, window = builders.causal(4_096), builders.sliding_window(4_096, 256)
    plan = ShardPlan.build([full, window], 4, weights=[1, 5])
    areas = [ShardPlan.build(mask, 1).areas[0] for mask in (full, window)]
    assert sum(plan.areas) == areas[0] + 5 * areas[1]
    fractions = [p.received_fraction for p in (ShardPlan.build(m, 4, strategy="zigzag") for m in (full, window))]
    both = ShardPlan.build([full, window], 4, weights=[1, 3], strategy="zigzag")
    assert both.received_fraction == pytest.approx((fractions[0] + 3 * fractions[1]) / 4)


@pytest.mark.parametrize("n", [5, 101, 1_003])
@pytest.mark.parametrize("world_size, head_parallel", [(4, 2), (6, 3), (6, 6), (8, 4)])
def test_rings_of_ranks_share_rows(n, world_size, head_parallel):
    mask = builders.causal_document(pack(n, seed=2))
    plan = ShardPlan.build(mask, world_size, head_parallel=head_parallel)
    rows = check_layout(plan, n, world_size)
    of_rings = replace(ShardPlan.build(mask, world_size // head_parallel), **plan.staging._asdict())
    for ring in range(plan.rings):
        together = torch.cat(rows[ring * head_parallel : (ring + 1) * head_parallel])
        assert together.equal(of_rings.rows(ring))
        for member in range(head_parallel):
            part = plan.local(ring * head_parallel + member)
            assert part.member_counts == tuple(len(r) for r in rows[ring * head_parallel :][:head_parallel])
            for stage, whole in zip(part.stages, of_rings.local(ring).stages, strict=True):
                assert stage.columns.equal(whole.columns) and stage.send_rows.equal(whole.send_rows)
                # Peers are the members of like number.
                assert stage.receive_counts[member::head_parallel] == whole.receive_counts
                assert sum(stage.receive_counts) == sum(whole.receive_counts)
    assert plan.imbalance == pytest.approx(of_rings.imbalance)
    assert plan.received_fraction == pytest.approx(of_rings.received_fraction)
    assert plan.fingerprint() != of_rings.fingerprint()


@pytest.mark.parametrize("batch", [1, 3])
def test_tables_count_scores_and_keys_of_each_pair(batch):
    n, world_size = 101, 3
    positions = torch.stack([torch.arange(n) % (20 + 17 * b) for b in range(batch)])
    mask = FlashMask.from_position_ids(positions)
    plan = ShardPlan.build(mask, world_size, chunk_size=9)
    ((areas, keys),) = plan.tables
    dense = mask.to_dense()
    for r in range(world_size):
        for c in range(world_size):
            tile = dense[:, :, plan.rows(r)][..., plan.rows(c)]
            assert areas[r, c] == tile.sum() and keys[r, c] == tile.any(2).flatten(0, 1).any(0).sum()


# Errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(mask=builders.full(8, num_rows=4), world_size=2), "as many rows as columns, got 4 x 8"),
        (dict(mask=[builders.full(8), builders.full(9)], world_size=2), r"one length, got \[8, 9\]"),
        (dict(mask=[], world_size=2), "non-empty"),
        (dict(mask=torch.ones(4, 4), world_size=2), "FlashMask"),
        (dict(mask=builders.full(8), world_size=0), "world_size must be an integer >= 1, got 0"),
        (dict(mask=builders.full(8), world_size=True), "world_size"),
        (dict(mask=builders.full(8), world_size=2, chunk_size=0), "chunk_size"),
        (dict(mask=builders.full(8), world_size=2, strategy="zig-zag"), r"got 'zig-zag'. Did you mean 'zigzag'\?"),
        (dict(mask=builders.full(8), world_size=2, strategy="zigzag", chunk_size=2), "chunk_size=2 is for strategy"),
        (
            dict(mask=builders.full(8), world_size=6, head_parallel=4),
            r"divide the 6 ranks: one of \[1, 2, 3, 6\], got 4",
        ),
        (dict(mask=builders.full(8), world_size=6, head_parallel=3, num_stages=3), r"in 2..2 for 2 rings of 3 ranks"),
        (dict(mask=builders.full(8), world_size=2, weights=[1, 2]), "1 integers >= 1"),
        (dict(mask=builders.full(8), world_size=2, weights=[0]), "integers >= 1"),
        (dict(mask=builders.full(8), world_size=4, num_stages=1), r"num_stages must be an integer in 2..4"),
        (dict(mask=builders.full(8), world_size=4, num_stages=5), r"num_stages must be an integer in 2..4"),
        (dict(mask=builders.full(8), world_size=1, num_stages=2), r"num_stages must be an integer in 1..1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        ShardPlan.build(**arguments)


def test_bad_ranks_stages_and_masks():
    plan = ShardPlan.build(builders.full(8), 2)
    with pytest.raises(ValueError, match=r"rank must be in 0..1"):
        plan.rows(2)
    with pytest.raises(ValueError, match=r"stage must be in 0..1"):
        plan.local_mask(0, 2)
    with pytest.raises(ValueError, match="9 positions but the plan was built for 8"):
        plan.local(0, builders.full(9))


@settings(max_examples=40, deadline=None)
@given(st.data(), raw_masks(shape=(2, 1, 9, 9)), st.integers(1, 4))
def test_a_layout_of_somebody_elses(data, raw, world_size):
    owners = torch.tensor(data.draw(st.lists(st.integers(0, world_size - 1), min_size=9, max_size=9)))
    mask, dense = FlashMask(*raw[:2], causal=raw.causal, num_rows=9), dense_of_intervals(raw)
    stages = data.draw(st.integers(min(2, world_size), world_size))
    plan = ShardPlan.from_owners(mask, owners, world_size, num_stages=stages)
    for rank in range(world_size):
        assert plan.rows(rank).equal((owners == rank).nonzero()[:, 0])
        assert plan.areas[rank] == int(dense[:, :, owners == rank].sum())
    assert plan.received_fraction == pytest.approx(check_stages(plan, dense))


def test_owners_that_do_not_fit():
    mask = builders.causal(4)
    for owners in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(1, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="owners must be 4 integers, one a position, got"):
            ShardPlan.from_owners(mask, owners, 2)
    with pytest.raises(ValueError, match=r"owners must be ranks in 0\.\.1, got 0\.\.2"):
        ShardPlan.from_owners(mask, torch.tensor([0, 1, 2, 0]), 2)
    with pytest.raises(ValueError, match="num_stages"):
        ShardPlan.from_owners(mask, torch.zeros(4, dtype=torch.int64), 2, num_stages=1)
