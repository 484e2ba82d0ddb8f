"""The cost model: its arithmetic by hand, and the timelines against a simulation of the two queues."""

import numpy as np
import pytest

from fm_longctx.context_parallel.cost import CostModel, Work, predict_backward, predict_forward

UNIT = CostModel(
    heads=1,
    kv_heads=1,
    head_dim=1,
    element_bytes=1,
    gradient_bytes=1,
    forward_flops=4,
    backward_flops=10,
    bandwidth=2,
    latency=0,
    memory_bandwidth=1e30,
)


def work(scores, far, rows=1.0, merged=1.0, longest=0.0):
    scores, far = np.array([scores]), np.array([far])
    return Work(scores, far, np.zeros_like(far), np.array([rows]), np.array([merged]), np.full_like(far, longest))


def test_seconds_by_hand():
    cost = CostModel()
    assert cost.forward_compute(np.array(1e9)) == pytest.approx(4 * 128 * 64 * 1e9 / 6.5e14)
    assert cost.backward_compute(np.array(1e9)) == pytest.approx(2.5 * 4 * 128 * 64 * 1e9 / 4.8e14)
    assert cost.forward_key_bytes == 2 * 8 * 128 * 2 and cost.backward_key_bytes == 2 * 8 * 128 * 4
    assert cost.transfer(np.array([0.0, 4.5e9])).tolist() == pytest.approx([0.0, 0.1 + 3e-5])


def test_links_within_and_between_hosts_work_at_the_same_time():
    cost = CostModel(latency=0)
    far, near = np.array([0.0, 4.5e9, 4.5e9]), np.array([3e10, 3e10, 6e10])
    assert cost.transfer(far, near).tolist() == pytest.approx([0.1, 0.1, 0.2])


@pytest.mark.parametrize(
    "members, host_ranks, far, near",
    [(4, 8, 0, 3), (8, 8, 0, 7), (16, 8, 8, 7), (8, 2, 6, 1), (3, 8, 2, 0), (8, 1, 7, 0)],
)
def test_trading_rows_for_heads_uses_the_links_that_the_members_have(members, host_ranks, far, near):
    cost = CostModel(latency=0, host_ranks=host_ranks)
    rows = np.array(1024.0)
    there, back = 1024 * (64 + 2 * max(8, members)) * 128 * 2, 1024 * 64 * 128 * 2
    link = (there + back) / members * max(far / 4.5e10, near / 3e11)
    assert cost.trade_link(rows, members) == pytest.approx(link)
    assert cost.trade_heads(rows, members) == pytest.approx(link + 2 * (there + back) / 2.5e12)
    assert cost.rings_a_host(members) == (host_ranks // members or 1 if host_ranks % members == 0 else 1)
    assert cost.trade_heads(rows, 1) == 0


def test_the_forward_waits_for_what_has_not_arrived():
    """Compute 2, 1, 1; transfers 1.5 and 2: the second starts when the first ends, and is waited for from 3 to 3.5."""
    prediction = predict_forward(UNIT, work([2.0, 1.0, 1.0], [0.0, 1.5, 2.0]))
    assert prediction.total.tolist() == pytest.approx([4.5]) and prediction.exposed.tolist() == pytest.approx([0.5])


def test_the_backward_hides_returns_behind_later_stages():
    """Remote stages 1 and 1, their returns 1.5 and 2 queue on the link: at 2.5 and 4.5; the own keys end at 4."""
    prediction = predict_backward(UNIT, work([2.0, 1.0, 1.0], [0.0, 2.0, 1.5]))
    assert prediction.total.tolist() == pytest.approx([4.5]) and prediction.exposed.tolist() == pytest.approx([0.5])


def test_merging_costs_memory_traffic_for_each_stage_that_others_came_before():
    cost, rows, merged = CostModel(latency=0), 8_192.0, 1_000.0
    for scores in ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]):
        done = work(scores, [0.0] * 3, rows, merged)
        forward, backward = predict_forward(cost, done).compute[0], predict_backward(cost, done).compute[0]
        assert forward == pytest.approx((4 * rows + 12 * merged) * 64 * 128 / 2.5e12, rel=1e-6)
        assert backward == pytest.approx(16 * rows * 64 * 128 / 2.5e12, rel=1e-6)
    alone = work([0.0, 1.0], [0.0] * 2, rows, merged)
    assert predict_forward(cost, alone).compute[0] == pytest.approx(0, abs=1e-9)


def test_a_key_that_many_rows_see_holds_up_the_backward():
    """One of 132 processors has its block's four products for 65,536 rows and 8 query heads to itself."""
    cost = CostModel(heads=8, kv_heads=1)
    scores, longest = np.array([1e9, 0.0, 1e12]), np.full(3, 65_536.0)
    alone = 4 * 2 * 128 * 128 * 65_536 * 8 / (4.8e14 * 7 / 5 / 132)
    shared = 10 * 128 * 8 / 4.8e14
    assert cost.backward_stage(scores, longest).tolist() == pytest.approx(
        [3 / 7 * 1e9 * shared + alone, 0, 1e12 * shared]
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(bandwidth=0.0), "bandwidth must be positive and finite, got 0.0"),
        (dict(host_bandwidth=-1.0), "host_bandwidth must be positive and finite"),
        (dict(host_ranks=0), "host_ranks must be positive"),
        (dict(latency=-1.0), "latency must be 0 or positive"),
        (dict(forward_flops=float("nan")), "forward_flops"),
        (dict(heads=6, kv_heads=4), "kv_heads must divide heads, got 4 and 6"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        CostModel(**options)
