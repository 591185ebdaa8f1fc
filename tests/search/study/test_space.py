"""Dimensions as the configuration takes them, and points that depend on seed and number alone."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest

from megadit.errors import UserError
from megadit.search.study.space import Space, build_space
from megadit.search.study.spec import DimensionSpec


def space(**dimensions: dict[str, Any]) -> Space:
    specs = {
        key.replace("__", "."): DimensionSpec(**{kind: tuple(values) for kind, values in spec.items()})
        for key, spec in dimensions.items()
    }
    return build_space(specs)


FOUR = {
    "optim__lr": {"log_uniform": [2.5e-5, 2.5e-3]},
    "optim__clip__value": {"log_uniform": [0.01, 100]},
    "objective__label_dropout": {"uniform": [0.1, 0.9]},
    "optim__warmup_steps": {"uniform": [1, 20000]},
}


def test_random_points_follow_their_distributions():
    points = space(**FOUR).random(400, seed=0)
    rates = [math.log10(point["optim.lr"]) for point in points]
    assert all(2.5e-5 <= point["optim.lr"] <= 2.5e-3 for point in points)
    # Uniform in the logarithm: the mean is the middle, the sd the length / sqrt 12.
    assert sum(rates) / 400 == pytest.approx(math.log10(2.5e-4), abs=4 * 2 / math.sqrt(12 * 400))
    share = sum(point["objective.label_dropout"] < 0.3 for point in points) / 400
    assert share == pytest.approx(0.25, abs=0.09)
    assert all(type(point["optim.warmup_steps"]) is int for point in points)
    low = sum(point["optim.warmup_steps"] <= 10000 for point in points) / 400
    assert low == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("draw", ["random", "quasi_random"])
def test_more_points_go_on_with_the_same_sequence(draw: str):
    four = space(**FOUR)
    few, many = getattr(four, draw)(5, 3), getattr(four, draw)(12, 3)
    assert many[:5] == few and len({repr(point) for point in many}) == 12
    assert getattr(four, draw)(5, 4) != few


def test_a_dimension_keeps_its_values_when_another_joins():
    alone = space(optim__lr=FOUR["optim__lr"]).random(5, 0)
    assert [p["optim.lr"] for p in space(**FOUR).random(5, 0)] == [p["optim.lr"] for p in alone]


def test_quasi_random_points_fill_the_space_evenly():
    points = space(optim__lr={"uniform": [1e-9, 1]}, optim__eps={"uniform": [1e-9, 1]}).quasi_random(63, 0)
    for key in ("optim.lr", "optim.eps"):
        counts = [sum(i / 8 <= point[key] < (i + 1) / 8 for point in points) for i in range(8)]
        assert max(counts) - min(counts) <= 2, counts


def test_quasi_random_points_are_those_of_studies_that_have_begun():
    points = space(**FOUR, optim__schedule={"choice": ["constant", "cosine"]}).quasi_random(3, 3)
    assert [tuple(point.values()) for point in points] == [
        (0.000626256, 1.37648, 0.436258, 7751, "constant"),
        (4.3985e-05, 0.482226, 0.584141, 14883, "cosine"),
        (0.000165194, 76.3213, 0.264119, 4705, "cosine"),
    ]


def test_grid_is_the_full_product_in_the_order_of_the_file():
    grid = space(optim__lr={"grid": ["2^-8", 0.5]}, optim__warmup_steps={"choice": [0, "1e1"]}).grid()
    assert grid == [
        {"optim.lr": lr, "optim.warmup_steps": steps} for lr in (2**-8, 0.5) for steps in (0, 10)
    ]  # fmt: skip
    assert [type(point["optim.warmup_steps"]) for point in grid] == [int] * 4


def test_values_are_as_the_configuration_holds_them():
    built = space(
        optim__clip__value={"choice": [1, None]}, optim__betas={"choice": [[0.9, 0.99]]}, data__flip={"choice": [True]}
    )
    assert [repr(dimension.values) for dimension in built.dimensions] == ["(1.0, None)", "([0.9, 0.99],)", "(True,)"]
    assert [dimension.numeric for dimension in built.dimensions] == [False, False, False]


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_whole_numbers_reach_both_bounds(kind: str):
    (dimension,) = space(optim__warmup_steps={kind: [1, 4]}).dimensions
    values = [dimension.at(i / 1000) for i in range(1001)]
    assert values == sorted(values) and set(values) == {1, 2, 3, 4} and type(values[0]) is int
    if kind == "uniform":
        assert values.count(1) == pytest.approx(250, abs=1) and values.count(4) == pytest.approx(250, abs=2)


def test_random_draws_from_lists_give_each_point_once_and_refuse_more():
    listed = space(optim__lr={"grid": [0.1, 0.2]}, optim__schedule={"choice": ["constant", "cosine"]})
    assert listed.size == 4
    assert sorted(map(repr, listed.random(4, 0))) == sorted(map(repr, listed.grid()))
    with pytest.raises(UserError, match="trials: 5 is more than the 4 points"):
        listed.random(5, 0)


def test_a_trial_of_optuna_draws_from_each_dimension():
    built = space(**FOUR, optim__schedule={"choice": ["constant", "cosine"]})
    drawn = {"optim.lr": 0.001, "optim.clip.value": 1.0, "objective.label_dropout": 0.5, "optim.warmup_steps": 100}
    trial = optuna.trial.FixedTrial(drawn | {"optim.schedule": 1})
    point = {dimension.key: dimension.suggest(trial) for dimension in built.dimensions}
    kinds = trial.distributions
    assert kinds["optim.lr"].log and kinds["optim.warmup_steps"].high == 20000
    assert point == drawn | {"optim.schedule": "cosine"}


@pytest.mark.parametrize(
    ("key", "spec", "message"),
    [
        ("optim.lrr", {"grid": [1]}, "space.optim.lrr: no such key; did you mean optim.lr?"),
        ("lr", {"grid": [1]}, "space.lr: no such key; did you mean optim.lr"),
        ("optim.clip", {"grid": [1]}, "space.optim.clip: is a section; search one of optim.clip.mode, optim.clip.val"),
        ("optim.schedule", {"uniform": [0, 1]}, "space.optim.schedule: uniform is for numbers"),
        ("optim.warmup_steps", {"uniform": [0, 1.5]}, "space.optim.warmup_steps: 1.5 is not a whole number"),
        ("objective.repa_wait", {"uniform": [0.1, 1]}, "space.objective.repa_wait: no such key"),
    ],
)
def test_keys_that_the_configuration_has_not(key: str, spec: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        space(**{key: spec})
    assert message in str(caught.value)
