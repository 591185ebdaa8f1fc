"""Importance finds what matters, ignores what does not, and says when it cannot tell."""

from __future__ import annotations

import math
import random

import pytest

from megadit.search.report.importance import Importance, measure_importance, points_needed, ranks


def sample(count: int, score) -> list[tuple[dict[str, float], float]]:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        hps = {"lr": 2 ** draw.uniform(-12, -4), "clip": 10 ** draw.uniform(-2, 2), "kind": draw.choice(["a", "b"])}
        made.append((hps, score(hps)))
    return made


def test_the_key_that_decides_gets_the_share_even_with_diverged_points():
    importance = measure_importance(
        sample(60, lambda h: math.nan if h["lr"] > 2**-5 else (math.log2(h["lr"]) + 8) ** 2 + (h["kind"] == "b") / 9),
        True,
    )
    assert isinstance(importance, Importance)
    shares = dict(importance.shares)
    assert importance.shares[0][0] == "lr" and shares["lr"] > 0.9
    assert shares["clip"] < 0.05 and importance.control < 0.05
    assert importance.points == 60 and 0 < importance.diverged < 20
    assert sum(shares.values()) + importance.control == pytest.approx(1.0, abs=1e-6)


def test_direction_matters_for_diverged_points_only():
    points = sample(40, lambda h: math.nan if h["lr"] > 2**-6 else 1.0 + (h["kind"] == "b"))
    lower, higher = (measure_importance(points, better) for better in (True, False))
    assert isinstance(lower, Importance) and isinstance(higher, Importance)
    assert lower.diverged == higher.diverged
    assert dict(higher.shares)["lr"] > 0.3


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ([], "fewer than two were varied"),
        ([({"a": 1, "b": 2}, 0.1), ({"a": 2, "b": 2}, 0.2)], "fewer than two were varied"),
        (sample(8, lambda h: h["lr"]), f"3 HPs need at least {points_needed(3)}"),
        (sample(30, lambda h: 1.0), "the same score"),
    ],
)
def test_it_says_why_there_is_none(points, why):
    assert why in measure_importance(points, True)


def test_ranks_share_ties():
    assert ranks_of([3.0, 1.0, 3.0, math.inf, math.inf, 2.0]) == [2.5, 0.0, 2.5, 4.5, 4.5, 1.0]


def ranks_of(values: list[float]) -> list[float]:
    import numpy as np

    return ranks(np.array(values)).tolist()


@pytest.mark.parametrize("others", [[0.9, 0.99], None, 0.5], ids=repr)
def test_a_list_is_a_category(others: object):
    points = sample(60, lambda h: 1.0 + (h["kind"] == "b") + h["lr"])
    listed = [({"lr": h["lr"], "betas": [0.9, 0.95] if h["kind"] == "a" else others}, score) for h, score in points]
    importance = measure_importance(listed, True)
    assert isinstance(importance, Importance)
    assert importance.shares[0][0] == "betas" and dict(importance.shares)["betas"] > 0.8
