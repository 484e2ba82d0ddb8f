"""The learning rate's shape."""

import pytest

from fm_longctx.train.config import ScheduleConfig
from fm_longctx.train.schedule import learning_rate_factor


def factors(steps, **options):
    return [learning_rate_factor(s, steps, ScheduleConfig(**options)) for s in range(steps)]


def test_cosine():
    assert factors(6, kind="cosine", warmup_steps=2, final_fraction=0.0) == pytest.approx(
        [0.5, 1, 1, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    assert min(factors(1000, kind="cosine", final_fraction=0.1)) == pytest.approx(0.1, abs=1e-4)


def test_wsd():
    assert factors(8, kind="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.2) == pytest.approx(
        [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    )


def test_constant():
    assert factors(4, kind="constant", warmup_steps=2) == [0.5, 1, 1, 1]
