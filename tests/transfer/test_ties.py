"""Scores that differ by rounding are one score: nothing that is chosen, ranked or judged hangs on last bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from helpers.studies.loss_surfaces import GRID, surface
from megadit.compare.runs import MeanCurve, _crossings, _time_to_target
from megadit.search.report.importance import measure_importance
from megadit.transfer.ties import at_most, difference, lowest, ranks, same_hps
from megadit.transfer.verdict import Limits, RunScore, TransferVerdict, judge

SCALES = (32.0, 64.0, 128.0)


def with_rounding_noise(samples: Sequence[RunScore], seed: int, size: float = 2e-7) -> list[RunScore]:
    """The scores as another CPU gives them: float32's last bits are others."""
    draw = np.random.default_rng(seed)
    return [replace(sample, score=sample.score * (1 + size * draw.uniform(-1, 1))) for sample in samples]


def rows(table: Sequence[Sequence[float]], scales: Sequence[float] = SCALES, first: float = -9.0) -> list[RunScore]:
    """A row of scores per scale, over whole octaves."""
    return [
        RunScore(scale, first + i, 0, score)
        for scale, scores in zip(scales, table, strict=True)
        for i, score in enumerate(scores)
    ]


def conclusions(verdict: TransferVerdict) -> tuple[object, ...]:
    """What a reader takes from it."""
    scales = [(scale.scale, scale.status, scale.best_log2, scale.exception) for scale in verdict.scales]
    return verdict.verdict, verdict.best_log2, verdict.wider_is_better, verdict.exceptions, scales


FLAT = [[0.5] * 5] * 3
TIE = [[0.6, 0.5, 0.5, 0.6, 0.8]] * 3  # two values do equally well
TIE_AT_THE_END = [[0.5, 0.5, 0.6, 0.7, 0.9]] * 3
REGRET_AT_THE_LIMIT = [[0.52, 0.5, 0.505, 0.53], [0.52, 0.505, 0.5, 0.53], [0.52, 0.505, 0.5, 0.53]]
AS_GOOD_WHEN_WIDER = [[0.6, 0.52, 0.5, 0.51, 0.6]] * 3
NEGATIVE = [[-0.6, -0.7, -0.7, -0.6, -0.3]] * 3
TABLES = {
    "flat": FLAT,
    "tie": TIE,
    "tie-at-the-end": TIE_AT_THE_END,
    "regret-at-the-limit": REGRET_AT_THE_LIMIT,
    "as-good-when-wider": AS_GOOD_WHEN_WIDER,
    "negative": NEGATIVE,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_verdict_on_ties_does_not_hang_on_last_bits(table: list[list[float]]) -> None:
    expected = conclusions(judge(rows(table)))
    for seed in range(12):
        assert conclusions(judge(with_rounding_noise(rows(table), seed))) == expected


@pytest.mark.parametrize("drift", [0.0, -0.75])
def test_seeds_that_agree_to_the_last_bits_have_no_noise_to_hide_in(drift: float) -> None:
    """Three seeds of the same score have a standard deviation of 1e-17 or of 0, as their mean is rounded."""
    samples = [replace(s, score=1.0, seed=seed) for s in surface(drift) for seed in range(3)]
    assert conclusions(judge(with_rounding_noise(samples, 0))) == conclusions(judge(samples))


def test_a_drift_at_the_limit_is_within() -> None:
    """The optimum moves by one octave in four: 1/4 of an octave each, which is the limit, whatever the sums say."""
    wide = [[0.5 + 0.02 * (i - best) ** 2 for i in range(6)] for best in (2, 3)]
    expected = judge(rows(wide, (64.0, 1024.0)), limits=Limits(max_regret=0.5))
    assert expected.drift == pytest.approx(0.25, abs=1e-9)
    for seed in range(12):
        perturbed = judge(with_rounding_noise(rows(wide, (64.0, 1024.0)), seed), limits=Limits(max_regret=0.5))
        assert conclusions(perturbed) == conclusions(expected)


def test_a_regret_of_the_limit_in_decimals_is_small() -> None:
    """.505 - .5 is more than .01 * .5 in binary; the paper's tables and people's are decimal."""
    assert 0.505 - 0.5 > 0.01 * 0.5
    verdict = judge(rows([[0.53, 0.5, 0.505, 0.53], [0.53, 0.505, 0.5, 0.53], [0.53, 0.505, 0.5, 0.53]]))
    assert all(scale.small for scale in verdict.scales)


def test_values_that_differ_by_rounding_are_one_value() -> None:
    """A grid that another program wrote with 7 digits, at one of the scales."""
    exact = surface(seeds=2)
    written = [replace(s, hp=s.hp + 3e-7) if s.scale == 64 else s for s in exact]
    two_values = [replace(s, hp=s.hp + 3e-7) if s.seed else s for s in exact]
    for samples in (written, two_values):
        assert conclusions(judge(samples)) == conclusions(judge(exact))
        assert [len(scale.optimum.curve.points) for scale in judge(samples).scales] == [len(GRID)] * 4


def test_a_true_difference_is_none_of_rounding() -> None:
    """What six digits tell apart stays apart."""
    samples = rows([[0.6, 0.50001, 0.5, 0.6, 0.8]] * 3)
    assert judge(samples).scales[0].best_log2 == -7.0
    assert judge(rows(TIE)).scales[0].best_log2 == -8.0
    assert difference(0.50001, 0.5) == pytest.approx(1e-5) and difference(0.5 + 1e-8, 0.5) == 0.0
    assert at_most(0.505 - 0.5, 0.01 * 0.5, 0.5) and not at_most(0.50001, 0.5, 0.5)


def test_the_lowest_of_ties_is_the_first() -> None:
    assert lowest(["a", "b", "c"], {"a": 0.5 + 1e-9, "b": 0.5, "c": 0.6}.__getitem__) == "a"
    assert lowest(["a", "b"], {"a": -0.5 + 1e-9, "b": -0.5}.__getitem__) == "a"
    assert lowest(["a", "b"], {"a": math.inf, "b": 0.5}.__getitem__) == "b"
    assert lowest(["a", "b"], {"a": math.inf, "b": math.inf}.__getitem__) == "a"


def test_ranks_share_ties_and_infinities() -> None:
    assert ranks([3.0, 1.0, 2.0, 2.0 + 1e-9, math.inf, math.inf]).tolist() == [3.0, 0.0, 1.5, 1.5, 4.5, 4.5]
    assert ranks([-2.0, -2.0 - 1e-9, -1.0]).tolist() == [0.5, 0.5, 2.0]
    assert ranks([]).tolist() == []
    assert ranks([0.5, 0.50001]).tolist() == [0.0, 1.0]


def test_same_values() -> None:
    assert same_hps([1.0, 1.0 + 1e-9, 2.0]) == {1.0: 1.0, 1.0 + 1e-9: 1.0, 2.0: 2.0}


def test_importance_of_scores_that_differ_by_rounding_is_not_estimated() -> None:
    draw = np.random.default_rng(0)
    points = [({"a": float(i), "b": float(draw.random())}, 0.5 * (1 + 2e-7 * draw.uniform(-1, 1))) for i in range(16)]
    assert measure_importance(points, True) == "Importance is not estimated: all finished points have the same score."


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_runs_that_differ_by_rounding_do_not_cross(sign: float) -> None:
    level = np.linspace(1.0, 0.5, 20)
    noise = 1e-8 * sign * np.where(np.arange(20) % 2, 1.0, -1.0)
    assert _crossings(np.arange(20), noise, level) == ()
    crossing = np.where(np.arange(20) < 10, 0.1, -0.1) + noise
    assert len(_crossings(np.arange(20), crossing, level)) == 1


@pytest.mark.parametrize("last_bits", [0.0, 1e-9, -1e-9])
def test_a_run_reaches_the_value_of_its_twin(last_bits: float) -> None:
    at, none = np.arange(1, 6), np.full(5, math.nan)
    parabola = np.array([1.0, 0.9, 0.8, 0.7, 0.6])
    reach = _time_to_target(MeanCurve(at, parabola + last_bits, none), MeanCurve(at, parabola, none))
    assert reach.at == pytest.approx(5.0, abs=1e-6) and reach.at <= 5.0
