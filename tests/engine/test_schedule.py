"""Schedules: closed forms, shares of the run, and lengths that do not fit are refused or told."""

import math

import pytest

from megadit.config import OptimConfig, load_config
from megadit.config.loading.sources import configs_dir
from megadit.engine.schedule import Schedule
from megadit.errors import UserError


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


QUICKSTARTS = sorted((configs_dir() / "quickstart").glob("*.yaml"))


@pytest.mark.parametrize("file", QUICKSTARTS, ids=lambda file: file.stem)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_quickstarts_may_be_of_any_length(file, steps):
    config = load_config(file, [f"train.steps={steps}"])
    assert Schedule.from_config(config.optim, steps).factor(steps - 1) > 0


USUAL = {"emoji": (1000, 400), "emoji-uvit": (1000, 400), "emoji-pixart": (1500, 500), "emoji-mmdit": (2000, 800)}


@pytest.mark.parametrize("name", USUAL)
def test_quickstarts_keep_their_curves(name):
    steps, decay = USUAL[name]
    config = load_config(f"quickstart/{name}.yaml")
    assert config.train.steps == steps
    schedule = Schedule.from_config(config.optim, steps)
    assert (schedule.kind, schedule.warmup, schedule.decay) == ("wsd", 50, decay)


def test_shares_are_rounded_down_and_fit_whatever_the_length():
    for total in range(1, 60):
        for warmup, decay in (("5%", "40%"), ("50%", "50%"), ("33.34%", "66.66%"), ("99.9%", "0.1%"), ("0%", "100%")):
            schedule = Schedule.from_config(OptimConfig(schedule="wsd", warmup_steps=warmup, decay_steps=decay), total)
            assert schedule.warmup == int(float(warmup[:-1]) * total / 100 + 1e-9)
            assert schedule.warmup + schedule.decay <= total and schedule.decay >= 1
        Schedule.from_config(OptimConfig(schedule="cosine", warmup_steps="99%"), total)
    assert Schedule.from_config(OptimConfig(warmup_steps="0.05%"), 200_000).warmup == 100
    assert Schedule.from_config(OptimConfig(warmup_steps="29%"), 100).warmup == 29  # .29 * 100 is below 29 in floats


def test_a_share_that_leaves_nothing_is_refused_with_its_steps():
    optim = OptimConfig(schedule="cosine", warmup_steps="100%")
    with pytest.raises(UserError, match=r"optim\.warmup_steps: 100% \(80 steps\) leaves nothing of the run's 80 steps"):
        Schedule.from_config(optim, 80)
    optim = OptimConfig(schedule="wsd", warmup_steps=50, decay_steps="40%")
    with pytest.raises(
        UserError, match="50 plus 1 decay steps exceed the run's 3 steps.* such as optim.warmup_steps=5%"
    ):
        Schedule.from_config(optim, 3)


def test_a_warm_up_that_a_constant_run_does_not_get_beyond_is_told_with_numbers():
    def warning(steps, **optim):
        return Schedule.from_config(OptimConfig(**optim), steps).warning

    assert warning(300, warmup_steps=1000) == (
        "optim.warmup_steps: 1,000 are no fewer than the run's 300 steps, so that its learning rate ends at 30% of "
        "optim.lr; shorten it, or give it as a share such as 5%"
    )
    assert "ends at 100% of optim.lr" in warning(300, warmup_steps="100%")
    assert warning(300, warmup_steps=299) is None and warning(1, warmup_steps=1) is None
    assert warning(300, schedule="cosine", warmup_steps=299) is None
