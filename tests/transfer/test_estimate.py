"""The optimum of one scale: recovered from known surfaces, with intervals that hold it, edges and noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.studies.loss_surfaces import WIDTHS, surface
from megadit.transfer.estimate import (
    Optimum,
    RunScore,
    ScaleCurve,
    ScoreNoise,
    estimate_noise,
    locate_optima,
    scale_curves,
)


def located(samples: list[RunScore], lower: bool = True) -> tuple[list[Optimum], ScoreNoise]:
    curves = [curve for curve in scale_curves(samples, lower).values() if curve is not None]
    noise = estimate_noise(curves)
    return locate_optima(curves, noise, 2.5), noise


def one(scores: list[float], first: float = -10.0) -> ScaleCurve:
    """A single scale with one seed, on a grid of whole octaves from ``first``."""
    samples = [RunScore(64.0, first + i, 0, score) for i, score in enumerate(scores)]
    (curve,) = scale_curves(samples, True).values()
    assert curve is not None
    return curve


@pytest.mark.parametrize("best", [-7.5, -7.3, -7.0, -6.6])
def test_an_exact_parabola_gives_its_vertex_and_no_certainty(best):
    optima, noise = located(surface(best=best))
    for optimum in optima:
        assert optimum.at == pytest.approx(best, abs=1e-3)
        low, high = optimum.interval
        assert low < best < high and 0.4 < high - low < 0.7  # a quarter of the grid's step to both sides
    assert noise.sd < 1e-3


def test_three_points_claim_no_certainty_either():
    optima, noise = located(surface(grid=(-8, -7, -6)))
    assert noise.source == "none"
    for optimum in optima:
        assert optimum.at == pytest.approx(-7.3, abs=1e-6)
        assert optimum.interval[1] - optimum.interval[0] > 0.4


def test_drifting_optima_are_followed():
    optima, _ = located(surface(-0.5, best=-6.2))
    assert [optimum.at for optimum in optima] == pytest.approx([-6.2, -6.7, -7.2, -7.7], abs=1e-3)


def test_the_steep_side_has_no_say():
    """A wall a hundred times the basin's depth moves the optimum by less than a quarter of a step."""
    samples = [s if s.hp < -5 else RunScore(s.scale, s.hp, s.seed, s.score + 3.0) for s in surface(best=-7.3)]
    for optimum in located(samples)[0]:
        assert optimum.at == pytest.approx(-7.3, abs=0.02)


@pytest.mark.parametrize(("seeds", "noise"), [(1, 0.005), (2, 0.005), (4, 0.005)])
@pytest.mark.parametrize("steep", [0.0, 0.3])
def test_intervals_hold_the_optimum(seeds, noise, steep):
    held, total = 0, 0
    for trial in range(12):
        best = -7.0 + 0.08 * trial
        for optimum in located(surface(best=best, seeds=seeds, noise=noise, steep=steep, rng=trial))[0]:
            held += optimum.interval[0] <= best <= optimum.interval[1]
            total += 1
    assert held >= 0.9 * total


def test_noise_is_measured_from_seeds_else_from_residuals():
    seeds = [located(surface(seeds=3, noise=0.01, rng=i))[1] for i in range(10)]
    assert {noise.source for noise in seeds} == {"seeds"}
    assert np.mean([noise.sd for noise in seeds]) == pytest.approx(0.01, rel=0.2)
    residuals = [located(surface(noise=0.01, steep=0.5, rng=i))[1] for i in range(20)]
    assert {noise.source for noise in residuals} == {"residuals"}
    assert np.mean([noise.sd for noise in residuals]) == pytest.approx(0.01, rel=0.35)


def test_what_a_seed_shifts_everywhere_is_no_noise():
    shifted = [RunScore(s.scale, s.hp, s.seed, s.score + 0.3 * s.seed) for s in surface(seeds=3, noise=0.005)]
    plain, noise = located(shifted)
    assert noise.sd == pytest.approx(0.005, rel=0.3) and noise.degrees_of_freedom == 4 * (3 - 1) * (3 - 1)
    assert max(optimum.interval[1] - optimum.interval[0] for optimum in plain) < 0.8


def test_more_noise_means_wider_intervals():
    def width(noise: float, seeds: int) -> float:
        optima, _ = located(surface(noise=noise, seeds=seeds, rng=5))
        return float(np.mean([optimum.interval[1] - optimum.interval[0] for optimum in optima]))

    assert width(0.001, 2) < width(0.02, 2)
    assert width(0.002, 5) < width(0.04, 5)  # whole seeds are resampled here


def test_edges_are_told_from_ends():
    inside = one([0.70, 0.62, 0.60, 0.65])
    assert (inside.low, inside.high) == ("inside", "inside")
    edge = one([0.70, 0.62, 0.60, math.nan])
    assert (edge.low, edge.high) == ("inside", "edge")
    end = one([0.70, 0.62, 0.60])
    assert (end.low, end.high) == ("inside", "open")
    assert one([0.60, 0.62, 0.70]).low == "open"


def test_the_optimum_stays_in_the_stable_range():
    (optimum,) = locate_optima([one([0.90, 0.70, 0.55, 0.45, math.nan])], ScoreNoise(0.0, 0, "none"), 2.5)
    assert optimum.at == -7.0  # the parabola would have it where runs diverge
    assert -7.0 < optimum.interval[1] <= -6.75
    assert not optimum.open


def test_what_lies_beyond_a_divergence_does_not_count():
    curve = one([0.70, 0.62, 0.60, math.nan, 0.65])
    assert [point.hp for point in curve.stable] == [-10.0, -9.0, -8.0]


def test_one_diverged_seed_makes_a_value_unstable():
    samples = [RunScore(64.0, hp, seed, 0.6 + 0.1 * abs(hp + 8)) for hp in (-10.0, -9.0, -8.0, -7.0) for seed in (0, 1)]
    samples.append(RunScore(64.0, -8.0, 2, math.nan))
    (curve,) = scale_curves(samples, True).values()
    assert curve is not None and curve.best.hp != -8.0


def test_without_curvature_the_best_point_is_the_optimum():
    (optimum,) = locate_optima([one([0.62, 0.60, 0.601, 0.600, 0.598, 0.60][::-1])], ScoreNoise(0.002, 5, "seeds"), 2.5)
    low, high = optimum.interval
    assert high - low > 1.0


def test_higher_is_better_is_the_mirror_image():
    mirrored = [RunScore(s.scale, s.hp, s.seed, -s.score) for s in surface(-0.3)]
    ours, theirs = located(surface(-0.3))[0], located(mirrored, lower=False)[0]
    assert [o.at for o in ours] == [o.at for o in theirs] and [o.interval for o in ours] == [o.interval for o in theirs]


def test_all_diverged_is_no_basin():
    curves = scale_curves([RunScore(float(w), -6.0, 0, math.nan if w == 256 else 0.5) for w in WIDTHS], True)
    assert curves[256.0] is None and curves[32.0] is not None


def test_the_same_samples_give_the_same_draws_in_any_order():
    samples = surface(noise=0.01, seeds=2)
    first, second = located(samples)[0], located(samples[::-1])[0]
    assert [o.interval for o in first] == [o.interval for o in second]


def test_points_that_diverge_far_beyond_do_not_widen_the_tried_range():
    nan = math.nan
    assert one([3, 2, 1, 2, 3]).tried_range == 4
    assert one([3, 2, 1, 2, nan]).tried_range == 4 == one([nan, 2, 1, 2, nan]).tried_range
    assert one([3, 2, 1, 2, nan, nan, nan, nan]).tried_range == 4
    far = [RunScore(64.0, hp, 0, score) for hp, score in ((-9.0, 2.0), (-8.0, 1.0), (-7.0, 2.0), (3.0, nan))]
    (curve,) = scale_curves(far, True).values()
    assert curve is not None and curve.tried_range == 3
    assert one([nan, 1, nan]).tried_range == 0
