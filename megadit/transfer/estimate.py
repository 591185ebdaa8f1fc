"""Where the optimum of a hyperparameter lies at one scale, and how well that is known.

Scores are compared against log2 of the hyperparameter. At every scale a parabola is fitted by weighted least squares
around the best point. Real curves are parabolas near their optimum only (above the best learning rate the loss is
steep), so a point counts with weight 1 / (sd²/n + (MISFIT · excess)²), where ``excess`` is its distance above the best
score: near points decide, points on the far walls have no say, and with much noise all of a flat basin is used. The
weights are a local window without a sharp end. If the curvature is not positive the best point itself is the optimum.

The interval of the optimum is a residual bootstrap over the (hyperparameter, seed) points: residuals in units of
their expected size, pooled over all scales and inflated for the degrees of freedom that the fits took; with
``SEEDS_TO_RESAMPLE`` seeds or more whole seeds are resampled instead. A fit through three points has no residuals and
would claim certainty, so every draw is moved by up to a quarter of the grid's step.

Edges: where a neighbour of the best point diverged, the optimum has a measured edge; where the grid just ends there,
the optimum is open on that side and only a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megadit.transfer.ties import SAME, SAME_HP, difference, lowest, same_hps

# A parabola's error as a part of the distance above the best score. Of surfaces whose upper side is up to twice as
# steep as the lower an octave away, .5 covers the optimum in 95 of 100 intervals; .3 does not.
MISFIT = 0.5
NOISE_MISFIT = 0.3  # less where residuals must tell noise from misfit: part of the excess is noise itself
SEEDS_TO_RESAMPLE = 4
MIN_POINTS = 3  # stable points that a scale must have to be judged
DRAWS = 2000
LEVEL = 0.95

Side = Literal["inside", "edge", "open"]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class RunScore:
    """One measured run: ``hp`` in log2 units; ``score`` NaN if the run diverged."""

    scale: float
    hp: float
    seed: int
    score: float


@dataclass(frozen=True)
class GridPoint:
    """All seeds at one value of the hyperparameter; ``scores`` are finite and lower is better here."""

    hp: float
    scores: dict[int, float]
    diverged: int = 0

    @property
    def stable(self) -> bool:
        """Whether every seed stayed finite: a value at which some seeds diverge is not one to use."""
        return not self.diverged

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class ScoreNoise:
    """Standard deviation of one run's score, from how many degrees of freedom, and from where.

    What a seed shifts alike at every value is no part of it: it cancels in the differences that are judged.
    """

    sd: float
    degrees_of_freedom: int
    source: Literal["seeds", "residuals", "none"]

    def standard_error(self, a: GridPoint, b: GridPoint) -> float:
        """Standard error of the difference of two points' means."""
        return 0.0 if a is b else self.sd * math.sqrt(1 / len(a.scores) + 1 / len(b.scores))

    def t_inflation(self, errors: float) -> float:
        """By how much Student's t exceeds a normal quantile of ``errors`` (first order in 1 / freedom)."""
        return 1.0 + (errors**2 + 1) / (4 * self.degrees_of_freedom) if self.degrees_of_freedom else 1.0


@dataclass(frozen=True)
class ScaleCurve:
    """One scale's points: ``stable`` is the run of stable points, without a gap, that holds the best one."""

    scale: float
    points: tuple[GridPoint, ...]
    stable: tuple[GridPoint, ...]
    best: GridPoint
    low: Side
    high: Side

    @property
    def steps(self) -> tuple[float, float]:
        """Distance from the best point to the next measured one below and above (the other side's at an end)."""
        hps = [point.hp for point in self.points]
        at = hps.index(self.best.hp)
        below = hps[at] - hps[at - 1] if at else None
        above = hps[at + 1] - hps[at] if at + 1 < len(hps) else None
        return below or above or 0.0, above or below or 0.0

    @property
    def reach(self) -> float:
        """The range that was tried: of the stable points, and a usual step to a neighbour that diverged.

        One that diverged far beyond says nothing of where the optimum is.
        """
        stable, hps = self.stable, [point.hp for point in self.points]
        span = stable[-1].hp - stable[0].hp
        first, last = hps.index(stable[0].hp), hps.index(stable[-1].hp)
        gaps = [hps[first] - hps[first - 1]] if first else []
        gaps += [hps[last + 1] - hps[last]] if last + 1 < len(hps) else []
        return span + sum(min(gap, span / max(1, len(stable) - 1)) for gap in gaps)

    @property
    def near(self) -> tuple[GridPoint, ...]:
        """The best point and its stable neighbours."""
        at = self.stable.index(self.best)
        return self.stable[max(0, at - 1) : at + 2]

    @property
    def seed_effects(self) -> dict[int, float]:
        """What each seed shifts all scores by, where all stable points have the same seeds; empty otherwise.

        Runs of one seed share their data and first weights. What that shifts alike does not move the optimum.
        """
        seeds = set(self.best.scores)
        if len(seeds) < 2 or len(self.near) < 2 or any(set(point.scores) != seeds for point in self.stable):
            return {}
        return {seed: sum(point.scores[seed] - point.mean for point in self.near) / len(self.near) for seed in seeds}

    def point(self, hp: float) -> GridPoint | None:
        """The measured point at ``hp``."""
        return next((point for point in self.points if math.isclose(point.hp, hp, abs_tol=SAME_HP)), None)

    def excess(self, point: GridPoint) -> float:
        """By how much a point is worse than the best; 0 where the two are the same score."""
        return difference(point.mean, self.best.mean)


@dataclass(frozen=True)
class Parabola:
    """``a + b·d + c·d²`` with d = log2 hp − centre; c > 0."""

    centre: float
    a: float
    b: float
    c: float

    @property
    def vertex(self) -> float:
        """Where the parabola is lowest."""
        return self.centre - self.b / (2 * self.c)

    def __call__(self, hp: float) -> float:
        d = hp - self.centre
        return self.a + self.b * d + self.c * d * d


@dataclass(frozen=True)
class Optimum:
    """The optimum of one scale in log2 units: estimate, interval, the parabola if there is one, bootstrap draws."""

    curve: ScaleCurve
    at: float
    interval: tuple[float, float]
    parabola: Parabola | None
    draws: Array

    @property
    def open(self) -> bool:
        """Whether the grid ends at the best point with nothing measured beyond: the optimum is only a bound."""
        return "open" in (self.curve.low, self.curve.high)


def scale_curves(samples: Sequence[RunScore], lower_is_better: bool) -> dict[float, ScaleCurve | None]:
    """Points by scale, ascending; None for a scale at which every run diverged."""
    sign = 1.0 if lower_is_better else -1.0
    hps = same_hps(sample.hp for sample in samples)
    found: dict[float, ScaleCurve | None] = {}
    for scale in sorted({sample.scale for sample in samples}):
        by_hp: dict[float, list[RunScore]] = {}
        for sample in samples:
            if sample.scale == scale:
                by_hp.setdefault(hps[sample.hp], []).append(sample)
        points = tuple(
            GridPoint(
                hp,
                {s.seed: sign * s.score for s in sorted(runs, key=lambda run: run.seed) if math.isfinite(s.score)},
                sum(not math.isfinite(s.score) for s in runs),
            )
            for hp, runs in sorted(by_hp.items())
        )
        found[scale] = _scale_curve(scale, points)
    return found


def _scale_curve(scale: float, points: tuple[GridPoint, ...]) -> ScaleCurve | None:
    stable = [i for i, point in enumerate(points) if point.stable]
    if not stable:
        return None
    best = lowest(stable, lambda i: points[i].mean)
    first = last = best
    while first and points[first - 1].stable:
        first -= 1
    while last + 1 < len(points) and points[last + 1].stable:
        last += 1
    low: Side = "inside" if best > first else "edge" if first else "open"
    high: Side = "inside" if best < last else "edge" if last + 1 < len(points) else "open"
    return ScaleCurve(scale, points, points[first : last + 1], points[best], low, high)


def estimate_noise(found: Sequence[ScaleCurve]) -> ScoreNoise:
    """The noise between seeds, pooled over scales.

    From repeated seeds at each scale's best point and its neighbours (far from the optimum runs differ more); where no
    point has two seeds, from how far the points lie off their parabolas (restricted maximum likelihood).
    """
    squares, degrees_of_freedom = 0.0, 0
    for curve in found:
        effects = curve.seed_effects
        for point in curve.near:
            squares += sum((score - effects.get(seed, 0.0) - point.mean) ** 2 for seed, score in point.scores.items())
            degrees_of_freedom += len(point.scores) - 1
        degrees_of_freedom -= max(len(effects) - 1, 0)
    if degrees_of_freedom >= 2:
        return ScoreNoise(math.sqrt(squares / degrees_of_freedom), degrees_of_freedom, "seeds")
    fitted = [curve for curve in found if len(curve.stable) > MIN_POINTS]
    if not fitted:
        return ScoreNoise(0.0, 0, "none")
    size = max(max(abs(b.best.mean), b.stable[0].mean - b.best.mean, b.stable[-1].mean - b.best.mean) for b in fitted)
    trials = np.geomspace(1e-5, 1.0, 81) * (size or 1.0)
    likelihood = np.sum([_likelihood(curve, trials) for curve in fitted], axis=0)
    best = int(np.argmax(likelihood))
    return ScoreNoise(float(trials[best]), sum(len(b.stable) - 3 for b in fitted), "residuals")


def _design(curve: ScaleCurve, sd: float | Array, misfit: float = MISFIT) -> tuple[Array, Array, Array]:
    """Design matrix, means and variances of the basin's points; with a column of ``sd``, a row of variances each."""
    d = np.array([point.hp - curve.best.hp for point in curve.stable])
    y = np.array([point.mean for point in curve.stable])
    counts = np.array([len(point.scores) for point in curve.stable])
    floor = (1e-9 * (abs(curve.best.mean) + float(np.ptp(y)) + 1e-30)) ** 2
    variance = sd**2 / counts + (misfit * (y - curve.best.mean)) ** 2 + floor
    return np.stack([np.ones_like(d), d, d * d], axis=1), y, variance


def _operator(design: Array, variance: Array) -> Array:
    """The matrix that maps scores to the weighted fit's coefficients; for rows of variances, a stack of them."""
    weight = 1 / np.sqrt(variance)
    return np.asarray(np.linalg.pinv(design * weight[..., None], rcond=1e-13) * weight[..., None, :])


def _likelihood(curve: ScaleCurve, trials: Array) -> Array:
    """Restricted log likelihood of every noise in ``trials`` at one scale."""
    design, y, variance = _design(curve, trials[:, None], NOISE_MISFIT)
    operator = _operator(design, variance)
    residual = y - (operator @ y) @ design.T
    _, spread = np.linalg.slogdet(np.einsum("np,tn,nq->tpq", design, 1 / variance, design))
    return np.asarray(-0.5 * (np.log(variance).sum(axis=1) + spread + (residual**2 / variance).sum(axis=1)))


def locate_optima(found: Sequence[ScaleCurve], noise: ScoreNoise, allowance: float) -> list[Optimum]:
    """The optimum of every scale with its interval; ``allowance``: how many standard errors of a difference are noise.

    The optimum may lie half a step beyond the points that cannot be told from the best, and never beyond the stable
    range. The same input gives the same draws.
    """
    rng = np.random.default_rng(0)
    residuals = _pooled_residuals(found, noise)
    return [_locate_optimum(curve, noise, allowance, residuals, rng) for curve in found]


def _pooled_residuals(found: Sequence[ScaleCurve], noise: ScoreNoise) -> Array:
    """Residuals of all (hp, seed) points in units of their expected size, centred, inflated for the fits' freedom."""
    pooled: list[float] = []
    parameters = 0
    for curve in found:
        if len(curve.stable) < MIN_POINTS:
            continue
        effects = curve.seed_effects
        design, means, variance = _design(curve, noise.sd)
        fit = design @ (_operator(design, variance) @ means)
        for point, value, mean_variance in zip(curve.stable, fit, variance, strict=True):
            single = mean_variance + noise.sd**2 * (1 - 1 / len(point.scores))
            pooled += [(y - effects.get(seed, 0.0) - value) / math.sqrt(single) for seed, y in point.scores.items()]
        parameters += 3
    if len(pooled) <= parameters:
        return np.zeros(1)
    values = np.array(pooled)
    return np.asarray((values - values.mean()) * math.sqrt(len(pooled) / (len(pooled) - parameters)))


def _locate_optimum(
    curve: ScaleCurve, noise: ScoreNoise, allowance: float, residuals: Array, rng: np.random.Generator
) -> Optimum:
    below, above = curve.steps
    design, y, variance = _design(curve, noise.sd)
    near = [p for p in curve.stable if curve.excess(p) <= allowance * noise.standard_error(p, curve.best)]
    low = max(near[0].hp - below / 2, curve.stable[0].hp)
    high = min(near[-1].hp + above / 2, curve.stable[-1].hp)
    if len(curve.stable) < MIN_POINTS:
        at, parabola, spread = curve.best.hp, None, rng.uniform(-1, 1, DRAWS) * max(below, above)
        draws = at + spread
    else:
        operator = _operator(design, variance)
        a, b, c = (float(value) for value in operator @ y)
        flat = _flat(curve)
        parabola = Parabola(curve.best.hp, a, b, c) if c > flat else None
        at = curve.best.hp if parabola is None else min(max(parabola.vertex, low), high)
        drawn = _resampled(curve, design @ (operator @ y), y, parabola is None, variance, noise, residuals, rng)
        coefficients = drawn @ operator.T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertices = curve.best.hp - coefficients[:, 1] / (2 * coefficients[:, 2])
        same = drawn <= drawn.min(axis=1, keepdims=True) + SAME * abs(curve.best.mean)
        deepest = design[np.argmax(same, axis=1), 1] + curve.best.hp
        draws = np.clip(np.where(coefficients[:, 2] > flat, vertices, deepest), low, high)
        jitter = rng.uniform(-0.5, 0.5, DRAWS) if parabola is None else rng.uniform(-0.25, 0.25, DRAWS)
        draws = draws + jitter * np.where(jitter < 0, below, above)
    tail = 50 * (1 - LEVEL)
    ends = np.percentile(draws, [tail, 100 - tail])
    return Optimum(curve, at, (min(float(ends[0]), at), max(float(ends[1]), at)), parabola, draws)


def _flat(curve: ScaleCurve) -> float:
    """The curvature that lifts the ends of the stable range by no more than rounding: none at all."""
    half = (curve.stable[-1].hp - curve.stable[0].hp) / 2
    return SAME * abs(curve.best.mean) / (half * half) if half else 0.0


def _resampled(
    curve: ScaleCurve,
    fit: Array,
    y: Array,
    no_curve: bool,
    variance: Array,
    noise: ScoreNoise,
    residuals: Array,
    rng: np.random.Generator,
) -> Array:
    """(DRAWS, points) bootstrap means: whole seeds where there are enough of them, else residuals around the fit."""
    seeds = sorted(set.intersection(*(set(point.scores) for point in curve.stable)))
    if len(seeds) >= SEEDS_TO_RESAMPLE:
        table = np.array([[point.scores[seed] for seed in seeds] for point in curve.stable])
        means = table[:, rng.integers(0, len(seeds), (DRAWS, len(seeds)))].mean(axis=2).T
        # Seeds share the curve, so resampling them says nothing of how badly a parabola fits it.
        misfit = MISFIT * (y - curve.best.mean)
        return np.asarray(means + (0.0 if no_curve else misfit * rng.standard_normal((DRAWS, len(y)))))
    drawn = np.empty((DRAWS, len(curve.stable)))
    for i, point in enumerate(curve.stable):
        count = len(point.scores)
        centre, single = fit[i], math.sqrt(float(variance[i]) + noise.sd**2 * (1 - 1 / count))
        if no_curve:  # the parabola is no description of these points: noise around the means instead
            centre, single = y[i], noise.sd
        drawn[:, i] = centre + single * rng.choice(residuals, (DRAWS, count)).mean(axis=1)
    return drawn
