"""Schedules: closed forms, and lengths that do not fit are refused."""

import math

import pytest

from megadit.config import OptimConfig
from megadit.errors import UserError
from megadit.train.schedule import Schedule


def factors(total: int, **optim: object) -> list[float]:
    schedule = Schedule.from_config(OptimConfig(**optim), total)
    return [schedule.factor(step) for step in range(total)]


def test_constant_warms_up_linearly_and_stays():
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_goes_from_one_to_the_floor():
    values = factors(100, schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert values[9] == 1.0
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert 0.1 < values[-1] < 0.102


def test_wsd_is_flat_then_falls_linearly():
    values = factors(100, schedule="wsd", decay_steps=20)
    assert set(values[:81]) == {1.0}
    assert values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)


def test_wsd_decays_over_a_tenth_by_default():
    assert factors(50, schedule="wsd")[45] == 1.0
    assert factors(50, schedule="wsd")[46] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "optim", [{"schedule": "wsd", "warmup_steps": 95}, {"schedule": "cosine", "warmup_steps": 100}]
)
def test_lengths_that_do_not_fit_are_refused(optim):
    with pytest.raises(UserError, match=r"optim\.warmup_steps"):
        Schedule.from_config(OptimConfig(**optim), 100)
