"""The cost model: its arithmetic by hand, and the timelines against a simulation of the two queues."""

import numpy as np
import pytest

from fm_longctx.context_parallel.cost import CostModel, predict_backward, predict_forward

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


def test_seconds_by_hand():
    cost = CostModel()
    assert cost.forward_compute(np.array(1e9)) == pytest.approx(4 * 128 * 64 * 1e9 / 5.5e14)
    assert cost.backward_compute(np.array(1e9)) == pytest.approx(2.5 * 4 * 128 * 64 * 1e9 / 4.5e14)
    assert cost.forward_key_bytes == 2 * 8 * 128 * 2 and cost.backward_key_bytes == 2 * 8 * 128 * 4
    assert cost.transfer(np.array([0.0, 4.5e9])).tolist() == pytest.approx([0.0, 0.1 + 3e-5])


def test_the_forward_waits_for_what_has_not_arrived():
    """Compute 2, 1, 1; transfers 1.5 and 2: the second starts when the first ends, and is waited for from 3 to 3.5."""
    scores, keys = np.array([[2.0, 1.0, 1.0]]), np.array([[0.0, 1.5, 2.0]])
    prediction = predict_forward(UNIT, scores, keys, np.ones(1))
    assert prediction.total.tolist() == pytest.approx([4.5]) and prediction.exposed.tolist() == pytest.approx([0.5])


def test_the_backward_hides_returns_behind_later_stages():
    """Remote stages 1 and 1, their returns 1.5 and 2 queue on the link: at 2.5 and 4.5; the own keys end at 4."""
    scores, keys = np.array([[2.0, 1.0, 1.0]]), np.array([[0.0, 2.0, 1.5]])
    prediction = predict_backward(UNIT, scores, keys, np.ones(1))
    assert prediction.total.tolist() == pytest.approx([4.5]) and prediction.exposed.tolist() == pytest.approx([0.5])


def test_merging_costs_memory_traffic_for_each_stage_that_has_keys():
    cost = CostModel(latency=0)
    scores, keys = np.array([[1.0, 0.0, 1.0]]), np.zeros((1, 3))
    compute = predict_forward(cost, scores, keys, np.array([8_192.0])).compute
    assert compute[0] == pytest.approx(16 * 8_192 * 64 * 128 / 2.5e12, rel=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(bandwidth=0.0), "bandwidth must be positive and finite, got 0.0"),
        (dict(latency=-1.0), "latency must be 0 or positive"),
        (dict(forward_flops=float("nan")), "forward_flops"),
        (dict(heads=6, kv_heads=4), "kv_heads must divide heads, got 4 and 6"),
    ],
)
def test_bad_numbers(options, words):
    with pytest.raises(ValueError, match=words):
        CostModel(**options)
