"""Where the optimum of a hyperparameter lies at one scale, and how well that is known.

Scores are fitted against log2 of the hyperparameter: weighted quadratic least squares around the best value, a pooled
variance between seeds or else restricted maximum likelihood for the noise of one run, and a bootstrap for the interval
of the vertex. Equation numbers are those of docs/search.md, "The statistics of a verdict", which derives them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megadit.transfer.ties import SAME, SAME_HP, difference, lowest, same_hps

# κ: a parabola's error as a part of the distance above the best score. Of surfaces whose upper side is up to twice as
# steep as the lower an octave away, .5 covers the optimum in 95 of 100 intervals; .3 does not.
MISFIT = 0.5
NOISE_MISFIT = 0.3  # less where residuals must tell noise from misfit: part of the excess is noise itself
SEEDS_TO_RESAMPLE = 4
MIN_POINTS = 3  # stable points that a scale must have to be judged
DRAWS = 2000
LEVEL = 0.95

GridEnd = Literal["inside", "edge", "open"]
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
    def runs(self) -> int:
        """How many seeds were run, diverged ones too."""
        return len(self.scores) + self.diverged

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class ScoreNoise:
    """Standard deviation σ of one run's score, its degrees of freedom ν, and what it was estimated from.

    What a seed shifts alike at every value is no part of it: it cancels in the differences that are judged.
    """

    sd: float
    degrees_of_freedom: int
    source: Literal["seeds", "residuals", "none"]

    def standard_error(self, a: GridPoint, b: GridPoint) -> float:
        """Standard error of the difference of two points' means (Eq. 9)."""
        return 0.0 if a is b else self.sd * math.sqrt(1 / len(a.scores) + 1 / len(b.scores))

    def t_inflation(self, z: float) -> float:
        """Ratio of Student's t quantile to the normal quantile ``z``, to first order in 1/ν (Eq. 10)."""
        return 1.0 + (z**2 + 1) / (4 * self.degrees_of_freedom) if self.degrees_of_freedom else 1.0


@dataclass(frozen=True)
class ScaleCurve:
    """Score against the hyperparameter at one scale; ``stable``: the contiguous stable points that hold the best one.

    ``low``, ``high``: what ends that range on the best point's side. A diverged neighbour of the best point is a
    measured "edge"; where the grid ends at it, the optimum is "open" there, only a bound.
    """

    scale: float
    points: tuple[GridPoint, ...]
    stable: tuple[GridPoint, ...]
    best: GridPoint
    low: GridEnd
    high: GridEnd

    @property
    def steps(self) -> tuple[float, float]:
        """Distance from the best point to the next measured one below and above (the other side's at an end)."""
        at = self.points.index(self.best)
        below = self.best.hp - self.points[at - 1].hp if at else 0.0
        above = self.points[at + 1].hp - self.best.hp if at + 1 < len(self.points) else 0.0
        return below or above, above or below

    @property
    def tried_range(self) -> float:
        """Width of the stable points' range, and up to a usual step to a neighbour that diverged.

        One that diverged far beyond says nothing of where the optimum is.
        """
        hps, low, high = [point.hp for point in self.points], self.stable[0].hp, self.stable[-1].hp
        usual = (high - low) / max(1, len(self.stable) - 1)
        below, above = max([hp for hp in hps if hp < low] or [low]), min([hp for hp in hps if hp > high] or [high])
        return high - low + (min(low - below, usual) + min(above - high, usual))

    @property
    def near(self) -> tuple[GridPoint, ...]:
        """The best point and its stable neighbours."""
        at = self.stable.index(self.best)
        return self.stable[max(0, at - 1) : at + 2]

    @property
    def seed_effects(self) -> dict[int, float]:
        """δ_s, what seed s shifts all scores by (Eq. 5), where all stable points have the same seeds; else empty.

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
        """Where the parabola is lowest (Eq. 4)."""
        return self.centre - self.b / (2 * self.c)

    def __call__(self, hp: float) -> float:
        d = hp - self.centre
        return self.a + self.b * d + self.c * d * d


@dataclass(frozen=True)
class QuadraticFit:
    """Weighted quadratic least squares through the P stable means of one scale (Eqs. 1 to 3).

    ``design`` (P, 3), ``means`` and ``counts`` of seeds (P,), ``variances`` (P,). Where several noises are tried at
    once, variances, ``operator`` and what follows from it have a leading dimension for them.
    """

    curve: ScaleCurve
    design: Array
    means: Array
    counts: Array
    variances: Array

    @classmethod
    def of(cls, curve: ScaleCurve, sd: float | Array, misfit: float = MISFIT) -> QuadraticFit:
        """The fit under noise ``sd``, or a column of them (Eq. 2: v = σ²/n + (κ·excess)²)."""
        d = np.array([point.hp - curve.best.hp for point in curve.stable])
        y = np.array([point.mean for point in curve.stable])
        counts = np.array([len(point.scores) for point in curve.stable])
        floor = (1e-9 * (abs(curve.best.mean) + float(np.ptp(y)) + 1e-30)) ** 2
        variances = sd**2 / counts + (misfit * (y - curve.best.mean)) ** 2 + floor
        return cls(curve, np.stack([np.ones_like(d), d, d * d], axis=1), y, counts, variances)

    @cached_property
    def operator(self) -> Array:
        """The matrix (3, P) that maps means to the coefficients (a, b, c) (Eq. 3)."""
        weight = 1 / np.sqrt(self.variances)
        return np.asarray(np.linalg.pinv(self.design * weight[..., None], rcond=1e-13) * weight[..., None, :])

    @property
    def fitted(self) -> Array:
        """The parabola's values at the stable points, (P,)."""
        return np.asarray((self.operator @ self.means) @ self.design.T)

    @property
    def flatness(self) -> float:
        """The curvature that lifts the ends of the stable range by no more than rounding: none at all."""
        half = (self.curve.stable[-1].hp - self.curve.stable[0].hp) / 2
        return SAME * abs(self.curve.best.mean) / (half * half) if half else 0.0

    @property
    def parabola(self) -> Parabola | None:
        """The fitted parabola; None through too few points, or where it has no positive curvature."""
        a, b, c = (float(value) for value in self.operator @ self.means)
        return Parabola(self.curve.best.hp, a, b, c) if len(self.means) >= MIN_POINTS and c > self.flatness else None

    def run_sd(self, noise: ScoreNoise) -> Array:
        """Expected size of one run's residual at each point, (P,) (Eq. 11)."""
        return np.asarray(np.sqrt(self.variances + noise.sd**2 * (1 - 1 / self.counts)))

    def log_likelihood(self) -> Array:
        """Restricted log likelihood of every noise that the fit was made for (Eq. 8)."""
        residual = self.means - self.fitted
        _, log_det = np.linalg.slogdet(np.einsum("np,tn,nq->tpq", self.design, 1 / self.variances, self.design))
        chi2 = (residual**2 / self.variances).sum(axis=1)
        return np.asarray(-0.5 * (np.log(self.variances).sum(axis=1) + log_det + chi2))

    def minima(self, means: Array) -> Array:
        """Where refits to ``means`` (draws, P) are lowest; the lowest mean where one has no positive curvature."""
        _, b, c = (means @ self.operator.T).T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertices = self.curve.best.hp - b / (2 * c)
        lowest_means = means <= means.min(axis=1, keepdims=True) + SAME * abs(self.curve.best.mean)
        deepest = self.design[np.argmax(lowest_means, axis=1), 1] + self.curve.best.hp
        return np.where(c > self.flatness, vertices, deepest)


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


def scale_curves(runs: Sequence[RunScore], lower_is_better: bool) -> dict[float, ScaleCurve | None]:
    """Points by scale, ascending; None for a scale at which every run diverged."""
    sign = 1.0 if lower_is_better else -1.0
    hps = same_hps(run.hp for run in runs)
    ordered = sorted(runs, key=lambda run: (run.scale, hps[run.hp], run.seed))
    points: dict[float, list[GridPoint]] = {}
    for (scale, hp), seeds in itertools.groupby(ordered, key=lambda run: (run.scale, hps[run.hp])):
        at_hp = [(run.seed, sign * run.score) for run in seeds]
        scores = {seed: score for seed, score in at_hp if math.isfinite(score)}
        diverged = sum(not math.isfinite(score) for _, score in at_hp)
        points.setdefault(scale, []).append(GridPoint(hp, scores, diverged))
    return {scale: _scale_curve(scale, tuple(at_scale)) for scale, at_scale in points.items()}


def _scale_curve(scale: float, points: tuple[GridPoint, ...]) -> ScaleCurve | None:
    stable = [i for i, point in enumerate(points) if point.stable]
    if not stable:
        return None
    best = lowest(stable, lambda i: points[i].mean)
    first = max((i + 1 for i in range(best) if not points[i].stable), default=0)
    end = min((i for i in range(best, len(points)) if not points[i].stable), default=len(points))
    low: GridEnd = "inside" if best > first else "edge" if first else "open"
    high: GridEnd = "inside" if best + 1 < end else "edge" if end < len(points) else "open"
    return ScaleCurve(scale, points, points[first:end], points[best], low, high)


def estimate_noise(curves: Sequence[ScaleCurve]) -> ScoreNoise:
    """The noise of one run, pooled over scales.

    From repeated seeds; where they give fewer than two degrees of freedom, from how far the points lie off their
    parabolas.
    """
    variance, freedom = pooled_variance(curves)
    if freedom >= 2:
        return ScoreNoise(math.sqrt(variance), freedom, "seeds")
    fitted = [curve for curve in curves if len(curve.stable) > MIN_POINTS]
    if not fitted:
        return ScoreNoise(0.0, 0, "none")
    return ScoreNoise(restricted_maximum_likelihood(fitted), sum(len(c.stable) - 3 for c in fitted), "residuals")


def pooled_variance(curves: Sequence[ScaleCurve]) -> tuple[float, int]:
    """Pooled variance between seeds without their common effects δ, and its degrees of freedom (Eqs. 5 to 7).

    Only the best point of each scale and its neighbours count: far from the optimum runs differ more.
    """
    squares, freedom = 0.0, 0
    for curve in curves:
        effects = curve.seed_effects
        for point in curve.near:
            squares += sum((score - effects.get(seed, 0.0) - point.mean) ** 2 for seed, score in point.scores.items())
            freedom += len(point.scores) - 1
        freedom -= max(len(effects) - 1, 0)
    return (squares / freedom if freedom > 0 else math.nan), freedom


def restricted_maximum_likelihood(curves: Sequence[ScaleCurve]) -> float:
    """The σ of the largest restricted (residual) likelihood over all scales (Eq. 8), on a logarithmic grid."""
    size = max(max(abs(c.best.mean), c.stable[0].mean - c.best.mean, c.stable[-1].mean - c.best.mean) for c in curves)
    trials = np.geomspace(1e-5, 1.0, 81) * (size or 1.0)
    fits = [QuadraticFit.of(curve, trials[:, None], NOISE_MISFIT) for curve in curves]
    return float(trials[np.argmax(np.sum([fit.log_likelihood() for fit in fits], axis=0))])


def locate_optima(curves: Sequence[ScaleCurve], noise: ScoreNoise, allowance: float) -> list[Optimum]:
    """The optimum of every scale with its interval; ``allowance``: how many standard errors of a difference are noise.

    The optimum may lie half a step beyond the points that cannot be told from the best, and never beyond the stable
    range. The same input gives the same draws.
    """
    rng = np.random.default_rng(0)
    fits = [QuadraticFit.of(curve, noise.sd) for curve in curves]
    residuals = studentised_residuals([fit for fit in fits if len(fit.means) >= MIN_POINTS], noise)
    return [_locate_optimum(fit, noise, allowance, residuals, rng) for fit in fits]


def studentised_residuals(fits: Sequence[QuadraticFit], noise: ScoreNoise) -> Array:
    """Residuals of all runs in units of their expected size, centred, inflated for the fits' parameters (Eq. 11)."""
    pooled: list[float] = []
    for fit in fits:
        effects = fit.curve.seed_effects
        for point, value, sd in zip(fit.curve.stable, fit.fitted, fit.run_sd(noise), strict=True):
            pooled += [(y - effects.get(seed, 0.0) - value) / sd for seed, y in point.scores.items()]
    parameters = 3 * len(fits)
    if len(pooled) <= parameters:
        return np.zeros(1)
    return np.asarray((np.array(pooled) - np.mean(pooled)) * math.sqrt(len(pooled) / (len(pooled) - parameters)))


def seed_bootstrap(fit: QuadraticFit, seeds: Sequence[int], rng: np.random.Generator) -> Array:
    """(DRAWS, P) means over whole seeds drawn with replacement (Eq. 12).

    Seeds share the curve, so resampling them says nothing of how badly a parabola fits it: the misfit is added.
    """
    table = np.array([[point.scores[seed] for seed in seeds] for point in fit.curve.stable])
    means = table[:, rng.integers(0, len(seeds), (DRAWS, len(seeds)))].mean(axis=2).T
    misfit = MISFIT * (fit.means - fit.curve.best.mean)
    return np.asarray(means if fit.parabola is None else means + misfit * rng.standard_normal(means.shape))


def residual_bootstrap(fit: QuadraticFit, noise: ScoreNoise, residuals: Array, rng: np.random.Generator) -> Array:
    """(DRAWS, P) fitted values plus means of drawn residuals (Eq. 13).

    Where the parabola is no description of the points: noise around their means instead.
    """
    centres, sds = (fit.fitted, fit.run_sd(noise)) if fit.parabola else (fit.means, np.full(len(fit.means), noise.sd))
    means = [rng.choice(residuals, (DRAWS, count)).mean(axis=1) for count in fit.counts]
    return np.asarray(centres + sds * np.stack(means, axis=1))


def percentile_interval(draws: Array, estimate: float | None = None) -> tuple[float, float]:
    """Percentile interval of the bootstrap at ``LEVEL`` (Eq. 15), widened where it has to be to hold the estimate."""
    tail = 50 * (1 - LEVEL)
    ends = [float(end) for end in np.percentile(draws, [tail, 100 - tail])]
    ends += [] if estimate is None else [estimate]
    return min(ends), max(ends)


def _locate_optimum(
    fit: QuadraticFit, noise: ScoreNoise, allowance: float, residuals: Array, rng: np.random.Generator
) -> Optimum:
    """The optimum, and its bootstrap draws between the bounds that ``locate_optima`` names (Eq. 14)."""
    curve, parabola, (below, above) = fit.curve, fit.parabola, fit.curve.steps
    near = [p for p in curve.stable if curve.excess(p) <= allowance * noise.standard_error(p, curve.best)]
    low = max(near[0].hp - below / 2, curve.stable[0].hp)
    high = min(near[-1].hp + above / 2, curve.stable[-1].hp)
    at = curve.best.hp if parabola is None else min(max(parabola.vertex, low), high)
    if len(curve.stable) < MIN_POINTS:
        draws = at + rng.uniform(-1, 1, DRAWS) * max(below, above)
    else:
        seeds = sorted(set.intersection(*(set(point.scores) for point in curve.stable)))
        resample_seeds = len(seeds) >= SEEDS_TO_RESAMPLE
        means = seed_bootstrap(fit, seeds, rng) if resample_seeds else residual_bootstrap(fit, noise, residuals, rng)
        # A fit through three points has no residuals and would claim certainty: a part of the grid's step is added.
        part = 0.5 if parabola is None else 0.25
        jitter = rng.uniform(-part, part, DRAWS)
        draws = np.clip(fit.minima(means), low, high) + jitter * np.where(jitter < 0, below, above)
    return Optimum(curve, at, percentile_interval(draws, at), parabola, draws)
