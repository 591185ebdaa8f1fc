"""What every scale says against the proxy's optimum, and what all scales say of its drift: two decision tables.

In ``SCALE_RULES`` and ``DRIFT_RULES`` the first rule whose condition holds decides. ``megadit.transfer.verdict`` makes
the verdict of both. Equation numbers are those of docs/search.md, "The statistics of a verdict".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from megadit.transfer.estimate import (
    MIN_POINTS,
    GridPoint,
    Optimum,
    RunScore,
    ScaleCurve,
    estimate_noise,
    locate_optima,
    percentile_interval,
    scale_curves,
)
from megadit.transfer.ties import SAME_HP, at_most, difference

Status = Literal["proxy", "agrees", "disagrees", "undecided"]

_SAME_DRIFT = 1e-3  # octaves per octave: a curve so flat that rounding moves its lowest point further is no curve


@dataclass(frozen=True)
class Limits:
    """What counts as transfer.

    max_drift: octaves per octave. The mildest wrong rule moves the optimum by half an octave per octave
        (a rate that must fall as n^-1/2); the limit is half of that.
    max_regret: part of the best score. Between seeds scores differ by about as much (measured: .5 to 1 percent).
    allowance: standard errors of a difference that count as noise. 2.5, not 2, as the best of several points is
        lucky by construction.
    max_blur: part of the tried range of log2 values (``ScaleCurve.tried_range``) that the optimum's path over the
        scales may be uncertain by.
    """

    max_drift: float = 0.25
    max_regret: float = 0.01
    allowance: float = 2.5
    max_blur: float = 0.25


class Evidence:
    """Everything measured, with each scale's optimum located once (``optima``, by scale).

    ``sign`` turns scores for which lower is better into scores as they were measured. ``labels``: words for people.
    """

    def __init__(
        self, runs: Sequence[RunScore], lower_is_better: bool, limits: Limits, labels: Mapping[str, str]
    ) -> None:
        self.lower_is_better, self.limits, self.labels = lower_is_better, limits, labels
        self.curves = scale_curves(runs, lower_is_better)
        present = [curve for curve in self.curves.values() if curve is not None]
        self.sign, self.noise = 1.0 if lower_is_better else -1.0, estimate_noise(present)
        self.allowance = limits.allowance * self.noise.t_inflation(limits.allowance)
        self.optima = {o.curve.scale: o for o in locate_optima(present, self.noise, self.allowance)}

    def name(self, scale: float) -> str:
        """A scale in words: ``width 288``."""
        return f"{self.labels.get('scale', 'scale')} {scale:.12g}"

    def as_good(self, curve: ScaleCurve, point: GridPoint | None) -> bool:
        """Whether a stable point cannot be told from the best one of its scale."""
        if point is None or not point.stable:
            return False
        return curve.excess(point) <= self.allowance * self.noise.standard_error(point, curve.best)

    def hidden(self, curve: ScaleCurve) -> bool:
        """Whether noise could make half of all the differences between values that were measured at this scale."""
        means = [point.mean for point in curve.points if point.stable]
        # Residuals hold misfit beside noise, so theirs is not made larger still for the few of them.
        errors = self.allowance if self.noise.source == "seeds" else self.limits.allowance
        noise = errors * self.noise.sd * math.sqrt(2 / len(curve.best.scores))
        return not at_most(noise, (max(means) - min(means)) / 2, curve.best.mean)

    def regret(self, optimum: Optimum, hp: float) -> tuple[float | None, float | None, float | None]:
        """(score at ``hp``, regret, its standard error), Eq. 16; infinite if ``hp`` diverges here, None if unknown."""
        curve, parabola, point = optimum.curve, optimum.parabola, optimum.curve.point(hp)
        if point is not None and point.stable:
            return point.mean, curve.excess(point), self.noise.standard_error(point, curve.best)
        if point is None and parabola is not None and curve.stable[0].hp <= hp <= curve.stable[-1].hp:
            # Between measured points: the parabola near the optimum, the straight line where the parabola is off.
            line = float(np.interp(hp, [p.hp for p in curve.stable], [p.mean for p in curve.stable]))
            score = min(line, max(parabola(hp), curve.best.mean))
            return score, difference(score, curve.best.mean), self.noise.sd * math.sqrt(2 / len(curve.best.scores))
        unstable = [p.hp for p in curve.points if not p.stable]
        diverges = any(curve.best.hp < u <= hp or hp <= u < curve.best.hp for u in unstable)
        return None, math.inf if diverges else None, None

    def flat_basin(self, scales: Sequence[float]) -> list[float]:
        """Values that at every scale cannot be told from the best, if there are three or more."""
        if any(scale not in self.optima for scale in scales):
            return []
        curves = [self.optima[scale].curve for scale in scales]
        hps = [point.hp for point in curves[0].stable]
        hps = [hp for hp in hps if all(self.as_good(curve, curve.point(hp)) for curve in curves)]
        return hps if len(hps) >= MIN_POINTS else []

    def best_common(self, scales: Sequence[float]) -> float | None:
        """The value measured and stable at all these scales with the lowest mean regret (relative where it can be)."""
        costs: dict[float, float] = {}
        curves = [self.optima[scale].curve for scale in scales]
        for hp in (point.hp for point in curves[0].points):
            pairs = [(curve, p) for curve in curves if (p := curve.point(hp)) is not None and p.stable]
            if len(pairs) == len(curves):
                costs[hp] = sum(curve.excess(point) / (abs(curve.best.mean) or 1.0) for curve, point in pairs)
        # Costs are parts of scores, so they are the same where they differ by rounding of the scores.
        least = min(costs.values(), default=0.0)
        return next((hp for hp, cost in costs.items() if at_most(cost, least, len(curves))), None)

    def larger_is_better(self, scales: Sequence[float]) -> tuple[bool | None, tuple[tuple[float, float, float], ...]]:
        """Whether at each value every larger scale is at least as good, noise aside; and where it is not.

        None where nothing was measured at two scales; else (log2 hp, smaller scale, larger scale) where it is not.
        """
        compared, worse = 0, []
        for small, large in itertools.pairwise(self.optima[scale].curve for scale in scales if scale in self.optima):
            for point in small.points:
                other = large.point(point.hp)
                if other is None or not point.stable:
                    continue
                compared += 1
                allowed = self.allowance * (self.noise.standard_error(point, other) if other.stable else 0.0)
                if not other.stable or difference(other.mean, point.mean) > allowed:
                    worse.append((point.hp, small.scale, large.scale))
        return (not worse if compared else None), tuple(worse)


class ScaleVerdict:
    """One scale against the proxy's best value: what ``SCALE_RULES`` look at, and what they decide.

    Scores have their own sign, hyperparameters are in log2 units; numbers are None where they are unknown.

    status, why: what the first rule that holds says.  exception: whether the verdict over all scales leaves it out.
    regret: score at the proxy's best value minus the best; infinite where that value diverges here.  regret_noise: its
    standard error.  regret_relative: as a part of the best score's size.

    small: the regret is within ``max_regret``, noise or not; no regret at all always is.  clear: it is above the noise.
    hidden: noise hides what the value does.  apart: the interval of the optima's distance excludes 0 (Eq. 15).
    neighbours: nothing was measured between the best value here and the proxy's.  flat: the proxy's best lies in a flat
    basin.
    """

    def __init__(
        self, evidence: Evidence, scale: float, proxy: float, flat_basin: Sequence[float] = (), exception: bool = False
    ) -> None:
        self.scale, self.exception, self.is_proxy = scale, exception, scale == proxy
        self.optimum, proxy_optimum = evidence.optima.get(scale), evidence.optima.get(proxy)
        self.best_log2: float | None = None
        self.best_score: float | None = None
        self.score_at_proxy_best: float | None = None
        self.regret: float | None = None
        self.regret_relative: float | None = None
        self.regret_noise: float | None = None
        self.proxy_diverged, self.small = proxy_optimum is None, True
        if self.optimum is not None and proxy_optimum is not None:
            self._compare(evidence, self.optimum, proxy_optimum, flat_basin)
        elif proxy_optimum is not None:
            self.regret, self.small = math.inf, False
        self.status, self.why = decide(SCALE_RULES, self)

    def _compare(self, evidence: Evidence, optimum: Optimum, proxy: Optimum, flat_basin: Sequence[float]) -> None:
        self.curve, hp, sign = optimum.curve, proxy.curve.best.hp, evidence.sign
        best, size = self.curve.best, abs(self.curve.best.mean)
        score, self.regret, self.regret_noise = evidence.regret(optimum, hp)
        self.best_log2, self.best_score = best.hp, sign * best.mean
        self.score_at_proxy_best = None if score is None else sign * score
        self.regret_relative = None if self.regret is None or not size else self.regret / size
        self.error, self.noise = self.regret_noise or 0.0, evidence.noise
        self.small = self.regret is None or at_most(self.regret, evidence.limits.max_regret * size, size)
        self.clear = self.regret is None or not at_most(self.regret, evidence.allowance * self.error, size)
        self.hidden = evidence.hidden(self.curve)
        low, high = percentile_interval(optimum.draws - proxy.draws)
        self.apart = not low <= 0 <= high
        low, high = sorted((best.hp, hp))
        self.neighbours = not any(low + SAME_HP < point.hp < high - SAME_HP for point in self.curve.points)
        self.flat = any(math.isclose(hp, value, abs_tol=SAME_HP) for value in flat_basin)
        count = len(self.curve.stable)
        self.stable_points = f"{count} stable point" + "s" * (count > 1)
        self.best, self.proxy_best = power(best.hp), f"the proxy's best {power(hp)}"
        self.cost = f"{self.proxy_best} costs {regret_text(self.regret, self.regret_relative)} more than {self.best}"
        self.cost_first = f"{self.cost}, and " if self.regret else ""
        self.error_text = f" (standard error {self.error:.2g})" if self.error else ""


class DriftComparison:
    """How the optimum moves over ``scales``, in what ``DRIFT_RULES`` look at; without a drift below two optima.

    ``drift``: the weighted least squares slope of log2 optimum against log2 scale, with its bootstrap ``interval``
    (Eqs. 17 and 18).  ``beyond``: the interval is wholly beyond the limit.  ``within``: the drift itself is not.
    ``movable``: an open optimum, once found, could make the drift smaller.  ``hidden``: noise hides what the value
    does at a scale.  ``blurred``: the optimum's path is uncertain by more than ``max_blur`` of the tried range.
    """

    def __init__(self, evidence: Evidence, scales: Sequence[float], flat_basin: Sequence[float] = ()) -> None:
        self.drift: float | None = None
        self.interval: tuple[float, float] | None = None
        self.within = False
        optima = [evidence.optima[scale] for scale in scales if scale in evidence.optima]
        if len(optima) < 2:
            return
        x = np.log2([optimum.curve.scale for optimum in optima])
        weight = 1 / (np.array([optimum.draws.var() for optimum in optima]) + 1e-12)
        centred = weight * (x - np.average(x, weights=weight))
        operator = centred / (centred @ x)
        self.drift = drift = float(operator @ np.array([optimum.at for optimum in optima]))
        self.interval = low, high = percentile_interval(operator @ np.stack([o.draws for o in optima]), drift)
        # Over less than an octave of scale the limit holds for the whole way, not per octave.
        octaves = math.log2(max(scales) / min(scales))
        limit = evidence.limits.max_drift / min(octaves, 1.0)
        self.beyond = max(low, -high) > limit + _SAME_DRIFT
        self.within = abs(drift) <= limit + _SAME_DRIFT
        turns = (x - x.mean()) * drift  # against these an open optimum has to lie
        ends = [(optimum.curve.low, optimum.curve.high) for optimum in optima]
        self.movable = any(
            (below == "open" and turn > 0) or (above == "open" and turn < 0)
            for (below, above), turn in zip(ends, turns, strict=True)
        )
        self.hidden = any(evidence.hidden(optimum.curve) for optimum in optima)
        tried = min(optimum.curve.tried_range for optimum in optima)
        self.blurred = (high - low) / 2 * octaves > evidence.limits.max_blur * tried
        self.unclear = not self.within and not low <= 0 <= high
        self.flat = f"{power(flat_basin[0])} to {power(flat_basin[-1])}" if flat_basin else ""
        self.text = f"the optimum drifts by {drift:+.2f} octaves per octave (95 % interval {low:+.2f} to {high:+.2f}; "
        self.text += f"limit {limit:.2g})"


class Rule(NamedTuple):
    """A row of a decision table: ``reason`` is a format string over the comparison ``c`` that ``holds`` looks at."""

    condition: str
    holds: Callable[[Any], bool]
    status: Status
    reason: str


def decide(rules: Sequence[Rule], comparison: ScaleVerdict | DriftComparison) -> tuple[Status, str]:
    """Status and reason of the first rule whose condition holds."""
    rule = next(rule for rule in rules if rule.holds(comparison))
    return rule.status, rule.reason.format(c=comparison)


# The order guards the conditions: where every run diverged, at the proxy or here, ``ScaleVerdict`` has none of the
# attributes that ``_compare`` sets, and one of the first two rules holds.
# fmt: off
SCALE_RULES = (
    Rule("every run diverged at the proxy", lambda c: c.proxy_diverged,
         "undecided", "every run diverged at the proxy"),
    Rule("every run diverged here", lambda c: c.optimum is None,
         "disagrees", "every run diverged"),
    Rule("the proxy's best diverges here", lambda c: c.regret == math.inf,
         "disagrees", "{c.proxy_best} diverges; the best here is {c.best}"),
    Rule("the proxy's best was not measured", lambda c: c.regret is None,
         "undecided", "{c.proxy_best} was not measured; add it to the values tried here"),
    Rule("regret above limit and noise, not hidden, and the optima are apart or values lie between them",
         lambda c: c.clear and not c.small and not c.hidden and (c.apart or not c.neighbours),
         "disagrees", "{c.cost}{c.error_text}"),
    Rule(f"fewer than {MIN_POINTS} stable points", lambda c: len(c.curve.stable) < MIN_POINTS,
         "undecided", f"only {{c.stable_points}} next to each other; at least {MIN_POINTS} are needed"),
    Rule("the lowest value is the best", lambda c: c.curve.low == "open",
         "undecided", "{c.cost_first}the best point {c.best} is the lowest that was tried; measure below it"),
    Rule("the highest value is the best", lambda c: c.curve.high == "open",
         "undecided", "{c.cost_first}the best point {c.best} is the highest that was tried; measure above it"),
    Rule("noise hides what the value does", lambda c: c.hidden,
         "undecided", "noise (sd {c.noise.sd:.3g}) hides what the value does; run more seeds or values"),
    Rule("the scale is the proxy", lambda c: c.is_proxy,
         "proxy", "the proxy's best is {c.best}"),
    Rule("no regret", lambda c: not c.regret,
         "agrees", "{c.proxy_best} is the best here too"),
    Rule("regret within the limit", lambda c: c.small,
         "agrees", "{c.cost}"),
    Rule("regret above limit and noise", lambda c: c.clear,
         "undecided", "{c.cost}, its neighbour, though the optima coincide; try values between"),
    Rule("the optima are apart, in no flat basin", lambda c: c.apart and not c.flat,
         "undecided", "{c.cost}, not clearly above the noise (standard error {c.error:.2g}), but the optima lie apart"),
    Rule("otherwise", lambda c: True,
         "agrees", "{c.cost}, within the noise (standard error {c.error:.2g})"),
)
DRIFT_RULES = (
    Rule("wholly beyond the limit, and an open optimum could make it smaller", lambda c: c.beyond and c.movable,
         "undecided", "{c.text}, but the open optimum may change that"),
    Rule("wholly beyond the limit, and noise hides what the value does at a scale", lambda c: c.beyond and c.hidden,
         "undecided", "{c.text}, but noise hides what the value does"),
    Rule("wholly beyond the limit", lambda c: c.beyond,
         "disagrees", "{c.text}"),
    Rule("uncertain or not clearly within the limit, in a flat basin", lambda c: c.flat and (c.blurred or c.unclear),
         "agrees", "{c.text}, but {c.flat} cannot be told from the best at any scale, so the place of the optimum "
                   "within does not matter"),
    Rule("uncertain by more than a part of the tried range", lambda c: c.blurred,
         "undecided", "{c.text}: too uncertain; run more seeds, or more values near the optimum"),
    Rule("not clearly within the limit", lambda c: c.unclear,
         "undecided", "{c.text}: not clearly within the limit; run more seeds, scales or values"),
    Rule("otherwise", lambda c: True,
         "agrees", "{c.text}"),
)
# fmt: on


def regret_text(regret: float | None, relative: float | None) -> str:
    """A regret for people, with its share of the best score."""
    if regret is None or math.isinf(regret):
        return "unknown" if regret is None else "infinite"
    return f"{regret:.3g}" + ("" if relative is None else f" ({100 * relative:.1f} %)")


def power(hp: float) -> str:
    """A log2 value for people: ``2^-10``."""
    return f"2^{hp:.4g}"
