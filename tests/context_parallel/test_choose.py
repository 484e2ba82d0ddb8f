"""What the cost model chooses by itself: heads or keys, and which rings share a host."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packs import pack
from fm_longctx import ShardPlan
from fm_longctx.context_parallel.choose import ways_to_split
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.place import busiest, place
from fm_longctx.mask import builders
from fm_longctx.train.config_load import load
from fm_longctx.train.inputs import plan_options


def slowest(plan):
    """Predicted seconds, forward and backward, of the slowest rank."""
    report = plan.report()
    return float(report.forward.total.max() + report.backward.total.max())


@pytest.mark.parametrize("length, world_size", [(65_536, 8), (131_072, 16)])
def test_heads_are_split_where_that_is_predicted_to_be_faster(length, world_size):
    mask = builders.causal_document(pack(length, seed=2))
    for cost in (CostModel(), CostModel(host_bandwidth=2e10), CostModel(bandwidth=2e9, host_bandwidth=9e11)):
        auto = ShardPlan.build(mask, world_size, head_parallel="auto", cost=cost)
        plans = [ShardPlan.build(mask, world_size, head_parallel=u, cost=cost) for u in (1, 2, 4, 8)]
        assert auto.fingerprint() in [plan.fingerprint() for plan in plans]
        # The choice is made by chunks, the report counts exactly.
        assert slowest(auto) <= 1.05 * min(slowest(plan) for plan in plans)


def test_a_slow_host_splits_keys_and_a_slow_network_splits_heads():
    mask = builders.causal_document(pack(131_072, seed=2))

    def chosen(**links):
        return ShardPlan.build(mask, 16, head_parallel="auto", cost=CostModel(**links)).head_parallel

    assert chosen(host_bandwidth=1e10) == 1
    assert chosen(bandwidth=5e9) == 8
    # Whoever has a host to itself gains nothing by either.
    assert chosen(host_ranks=1) == 1


def test_ways_to_split_heads():
    assert ways_to_split(64, None, None, CostModel()) == [1, 2, 4, 8]
    assert ways_to_split(64, None, None, CostModel(heads=4, kv_heads=2)) == [1, 2, 4]
    assert ways_to_split(12, None, None, CostModel(host_ranks=6, heads=12, kv_heads=3)) == [1, 3, 6]
    assert ways_to_split(8, None, None, CostModel(heads=20, kv_heads=5)) == [1]
    # What is given must remain possible.
    assert ways_to_split(8, 4, None, CostModel()) == [1, 2]
    assert ways_to_split(8, None, 1, CostModel()) == [1, 2, 4]
    # Many rings take too long to plan, unless heads cannot be split.
    assert ways_to_split(256, None, None, CostModel()) == [4, 8]
    assert ways_to_split(4096, None, None, CostModel()) == [8]
    assert ways_to_split(256, None, None, CostModel(heads=1, kv_heads=1)) == [1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1 << 30))
def test_rings_are_renumbered_only_to_send_less_between_hosts(rings, a_host, seed):
    random = np.random.default_rng(seed)
    keys = random.integers(0, 50, (rings, rings)) * (random.random((rings, rings)) < 0.4)
    number = place(keys, a_host)
    assert sorted(number.tolist()) == list(range(rings))
    hosts = np.arange(rings) // a_host
    before, after = busiest(keys, hosts), busiest(keys, number // a_host)
    assert after < before or (number == np.arange(rings)).all()


def test_rings_that_exchange_share_a_host():
    keys = np.zeros((6, 6), dtype=np.int64)
    for pair in ((0, 3), (1, 4), (2, 5)):
        keys[pair] = keys[pair[::-1]] = 100
    keys[0, 1] = 1
    number = place(keys, 2)
    assert busiest(keys, np.arange(6) // 2) == 100 and busiest(keys, number // 2) == 1


def test_documents_stay_on_a_host_where_they_can():
    """Two documents in turns over the sequence cannot be told from their order: their rings are put together."""
    mask = builders.document([16_384] * 4)
    cost = CostModel(host_ranks=2)
    plan = ShardPlan.build(mask, 8, cost=cost)
    report = plan.report()
    apart = ShardPlan.build(mask, 8, cost=CostModel(host_ranks=1)).report()
    assert plan.imbalance <= 1.02
    assert report.far.sum() == 0 < apart.far.sum() == report.received.sum()


def test_a_config_leaves_the_choice_to_the_layer_that_it_trains(monkeypatch):
    arguments = ["--parallel.head_parallel", "null", "--parallel.context", "4", "--parallel.tensor", "2"]
    config = load("configs/demo_cpu.yaml", [*arguments, "--model.num_attention_heads", "8"])
    options = plan_options(config)
    assert options["head_parallel"] == "auto"
    assert (options["cost"].heads, options["cost"].host_ranks) == (4, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan_options(config)["cost"].host_ranks == 1
    assert plan_options(load("configs/demo_cpu.yaml", []))["head_parallel"] == 1
