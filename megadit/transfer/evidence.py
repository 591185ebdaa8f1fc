"""What every scale says against the proxy's optimum, and what all scales say of its drift.

``megadit.transfer.verdict`` tells the rules and makes the verdict of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megadit.transfer.estimate import LEVEL, MIN_POINTS, Optimum, ScaleCurve, estimate_noise, locate_optima
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
    max_blur: part of the tried range of log2 values (``Basin.reach``) that the way of the optimum over the scales may
        be uncertain by.
    """

    max_drift: float = 0.25
    max_regret: float = 0.01
    allowance: float = 2.5
    max_blur: float = 0.25


@dataclass(frozen=True)
class ScaleVerdict:
    """One scale; scores with their own sign, hyperparameters in log2 units.

    ``regret`` is infinite where the proxy's best diverges and None where it is unknown; ``why`` says what decided.
    """

    scale: float
    status: Status
    why: str
    optimum: Optimum | None
    best_hp: float | None = None
    best_score: float | None = None
    score_at_proxy_best: float | None = None
    regret: float | None = None
    regret_noise: float | None = None
    exception: bool = False

    @property
    def regret_relative(self) -> float | None:
        """Regret as a part of the best score's size."""
        if self.regret is None or not self.best_score:
            return None
        return self.regret / abs(self.best_score)

    def small(self, limits: Limits) -> bool:
        """Whether the regret is known to be within ``max_regret``, noise or not; no regret at all always is."""
        best = abs(self.best_score or 0.0)
        return self.regret is None or at_most(self.regret, limits.max_regret * best, best)


@dataclass
class Evidence:
    """Everything measured, with each scale's optimum located once."""

    found: Mapping[float, ScaleCurve | None]
    lower_is_better: bool
    limits: Limits
    labels: dict[str, str]

    def __post_init__(self) -> None:
        present = [curve for curve in self.found.values() if curve is not None]
        self.noise = estimate_noise(present)
        self.allowance = self.limits.allowance * self.noise.t_inflation(self.limits.allowance)
        located = locate_optima(present, self.noise, self.allowance)
        self.optima = {optimum.curve.scale: optimum for optimum in located}

    def _located(self, scales: Sequence[float]) -> list[Optimum]:
        return [self.optima[scale] for scale in scales if scale in self.optima]

    def name(self, scale: float) -> str:
        """A scale in words: ``width 288``."""
        return f"{self.labels.get('scale', 'scale')} {scale:.12g}"

    def compare(self, scale: float, proxy: float, good: Sequence[float] = ()) -> ScaleVerdict:
        """One scale against the proxy's best point; ``good``: a basin in which the place does not matter."""
        optimum, proxy_optimum = self.optima.get(scale), self.optima.get(proxy)
        if proxy_optimum is None:
            return ScaleVerdict(scale, "undecided", "every run diverged at the proxy", optimum)
        carried = proxy_optimum.curve.best.hp
        if optimum is None:
            curve = self.found[scale]
            assert curve is None
            return ScaleVerdict(scale, "disagrees", "every run diverged", None, regret=math.inf)
        sign = 1.0 if self.lower_is_better else -1.0
        best = optimum.curve.best
        at, regret, noise = self._regret(optimum, carried)
        entry = ScaleVerdict(
            scale,
            "proxy" if scale == proxy else "undecided",
            "",
            optimum,
            best_hp=best.hp,
            best_score=sign * best.mean,
            score_at_proxy_best=None if at is None else sign * at,
            regret=regret,
            regret_noise=noise,
        )
        status, why = self._status(entry, optimum, proxy_optimum, good)
        return replace(entry, status=status, why=why)

    def _regret(self, optimum: Optimum, hp: float) -> tuple[float | None, float | None, float | None]:
        """(score at ``hp``, regret, its standard error); infinite if ``hp`` diverges here, None if unknown."""
        curve = optimum.curve
        point = curve.point(hp)
        if point is not None and not point.stable:
            return None, math.inf, None
        if point is not None:
            return point.mean, curve.excess(point), self.noise.standard_error(point, curve.best)
        if optimum.parabola is not None and curve.stable[0].hp <= hp <= curve.stable[-1].hp:
            # Between measured points: the parabola near the optimum, the straight line where the parabola is off.
            line = float(np.interp(hp, [p.hp for p in curve.stable], [p.mean for p in curve.stable]))
            at = min(line, max(optimum.parabola(hp), curve.best.mean))
            return at, difference(at, curve.best.mean), self.noise.sd * math.sqrt(2 / len(curve.best.scores))
        unstable = [p.hp for p in curve.points if not p.stable]
        beyond = any(curve.best.hp < u <= hp or hp <= u < curve.best.hp for u in unstable)
        return None, math.inf if beyond else None, None

    def _status(
        self, entry: ScaleVerdict, optimum: Optimum, proxy_optimum: Optimum, good: Sequence[float]
    ) -> tuple[Status, str]:
        curve = optimum.curve
        best, carried = power(curve.best.hp), power(proxy_optimum.curve.best.hp)
        if entry.regret == math.inf:
            return "disagrees", f"the proxy's best {carried} diverges; the best here is {best}"
        if entry.regret is None:
            return "undecided", f"the proxy's best {carried} was not measured; add it to the values tried here"
        cost = f"the proxy's best {carried} costs {regret_text(entry.regret, entry.regret_relative)} more than {best}"
        noise = entry.regret_noise or 0.0
        clear = not at_most(entry.regret, self.allowance * noise, curve.best.mean)
        small = entry.small(self.limits)
        gap = np.percentile(optimum.draws - proxy_optimum.draws, [50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL)])
        apart = not gap[0] <= 0 <= gap[1]
        hidden = self._hidden(curve)
        if clear and not small and not hidden and (apart or not _neighbours(curve, proxy_optimum.curve.best.hp)):
            return "disagrees", cost + (f" (standard error {noise:.2g})" if noise else "")
        if (count := len(curve.stable)) < MIN_POINTS:
            points = f"{count} stable point{'s' if count > 1 else ''}"
            return "undecided", f"only {points} next to each other; at least {MIN_POINTS} are needed"
        if optimum.open:
            end, where = ("below", "lowest") if curve.low == "open" else ("above", "highest")
            known = f"{cost}, and " if entry.regret else ""
            return "undecided", f"{known}the best point {best} is the {where} that was tried; measure {end} it"
        if hidden:
            return "undecided", f"noise (sd {self.noise.sd:.3g}) hides what the value does; run more seeds or values"
        if entry.status == "proxy":
            return "proxy", f"the proxy's best is {best}"
        if small:
            return "agrees", cost if entry.regret else f"the proxy's best {carried} is the best here too"
        if clear:
            return "undecided", f"{cost}, its neighbour, though the optima coincide; try values between"
        if apart and not any(math.isclose(proxy_optimum.curve.best.hp, hp, abs_tol=SAME_HP) for hp in good):
            return (
                "undecided",
                f"{cost}, not clearly above the noise (standard error {noise:.2g}), but the optima lie apart",
            )
        return "agrees", f"{cost}, within the noise (standard error {noise:.2g})"

    def _hidden(self, curve: ScaleCurve) -> bool:
        """Whether noise could make half of all the differences between values that were seen at this scale."""
        seen = [point.mean for point in curve.points if point.stable]
        # Residuals hold misfit beside noise, so theirs is not made larger still for the few of them.
        errors = self.allowance if self.noise.source == "seeds" else self.limits.allowance
        noise = errors * self.noise.sd * math.sqrt(2 / len(curve.best.scores))
        return not at_most(noise, (max(seen) - min(seen)) / 2, curve.best.mean)

    def drift(self, scales: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
        """Weighted slope of log2 optimum against log2 scale, with its bootstrap interval."""
        optima = self._located(scales)
        if len(optima) < 2:
            return None, None
        x = np.log2([optimum.curve.scale for optimum in optima])
        weight = 1 / (np.array([optimum.draws.var() for optimum in optima]) + 1e-12)
        centred = weight * (x - np.average(x, weights=weight))
        operator = centred / (centred @ x)
        draws = operator @ np.stack([optimum.draws for optimum in optima])
        drift = float(operator @ np.array([optimum.at for optimum in optima]))
        low, high = np.percentile(draws, [50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL)])
        return drift, (min(float(low), drift), max(float(high), drift))

    def judge_drift(
        self, scales: Sequence[float], drift: float | None, interval: tuple[float, float] | None, good: Sequence[float]
    ) -> tuple[list[str], list[str], list[str]]:
        """Sentences that say no, that leave it open, and that are fine."""
        if drift is None or interval is None:
            return [], [], []
        limit, optima = self.drift_limit(scales), self._located(scales)
        said = f"the optimum drifts by {drift:+.2f} octaves per octave (95 % interval {interval[0]:+.2f} to "
        said += f"{interval[1]:+.2f}; limit {limit:.2g})"
        if beyond(interval[0], limit) or beyond(-interval[1], limit):
            if _bound(optima, drift):
                return [], [f"{said}, but the open optimum may change that"], []
            if any(self._hidden(optimum.curve) for optimum in optima):
                return [], [f"{said}, but noise hides what the value does"], []
            return [said], [], []
        span = math.log2(max(scales) / min(scales))
        tried = min(optimum.curve.reach for optimum in optima)
        doubt = ""
        if (interval[1] - interval[0]) / 2 * span > self.limits.max_blur * tried:
            doubt = "too uncertain; run more seeds, or more values near the optimum"
        elif beyond(abs(drift), limit) and not interval[0] <= 0 <= interval[1]:
            doubt = "not clearly within the limit; run more seeds, scales or values"
        if doubt and good:
            flat = f"{power(good[0])} to {power(good[-1])} cannot be told from the best at any scale"
            return [], [], [f"{said}, but {flat}, so the place of the optimum within does not matter"]
        return ([], [f"{said}: {doubt}"], []) if doubt else ([], [], [said])

    def drift_limit(self, scales: Sequence[float]) -> float:
        """``max_drift``; over less than an octave of scale it holds for the whole way, not per octave."""
        span = math.log2(max(scales) / min(scales))
        return self.limits.max_drift / min(span, 1.0) if span else self.limits.max_drift

    def indistinguishable(self, scales: Sequence[float]) -> list[float]:
        """Values that at every scale cannot be told from the best, if there are three or more: a flat basin."""
        if any(scale not in self.optima for scale in scales):
            return []
        basins_here = [self.optima[scale].curve for scale in scales]
        good = [
            point.hp
            for point in basins_here[0].stable
            if all(
                (other := curve.point(point.hp)) is not None
                and other.stable
                and curve.excess(other) <= self.allowance * self.noise.standard_error(other, curve.best)
                for curve in basins_here
            )
        ]
        return good if len(good) >= MIN_POINTS else []

    def common(self, scales: Sequence[float]) -> float | None:
        """The value measured and stable at all these scales with the lowest mean regret (relative where it can be)."""
        costs: dict[float, float] = {}
        basins_here = [self.optima[scale].curve for scale in scales]
        for candidate in basins_here[0].points:
            points = [curve.point(candidate.hp) for curve in basins_here]
            stable = [point for point in points if point is not None and point.stable]
            if len(stable) == len(basins_here):
                costs[candidate.hp] = sum(
                    curve.excess(point) / (abs(curve.best.mean) or 1.0)
                    for point, curve in zip(stable, basins_here, strict=True)
                )
        # Costs are parts of scores, so they are the same where they differ by rounding of the scores.
        least = min(costs.values(), default=0.0)
        return next((hp for hp, cost in costs.items() if at_most(cost, least, len(basins_here))), None)

    def wider(self, scales: Sequence[float]) -> tuple[bool | None, tuple[tuple[float, float, float], ...]]:
        """Whether at each value every larger scale is at least as good, noise aside; and where it is not."""
        compared, worse = 0, []
        for small, large in itertools.pairwise(self._located(scales)):
            for point in small.curve.points:
                other = large.curve.point(point.hp)
                if other is None or not point.stable:
                    continue
                compared += 1
                allowed = self.allowance * (self.noise.standard_error(point, other) if other.stable else 0.0)
                if not other.stable or difference(other.mean, point.mean) > allowed:
                    worse.append((point.hp, small.curve.scale, large.curve.scale))
        return (not worse if compared else None), tuple(worse)


def beyond(drift: float, limit: float) -> bool:
    """Whether a drift is above its limit by more than rounding of scores moves it."""
    return drift > limit + _SAME_DRIFT


def _neighbours(curve: ScaleCurve, hp: float) -> bool:
    """Whether nothing was measured between the basin's best point and ``hp``."""
    low, high = sorted((curve.best.hp, hp))
    return not any(low + SAME_HP < point.hp < high - SAME_HP for point in curve.points)


def regret_text(regret: float, relative: float | None) -> str:
    """A regret for people, with its share of the best score."""
    return f"{regret:.3g}" + ("" if relative is None else f" ({100 * relative:.1f} %)")


def _bound(optima: Sequence[Optimum], drift: float) -> bool:
    """Whether an open optimum, once found, could make the drift smaller."""
    middle = float(np.mean([math.log2(optimum.curve.scale) for optimum in optima]))
    for optimum in optima:
        below, above = (side == "open" for side in (optimum.curve.low, optimum.curve.high))
        turn = (math.log2(optimum.curve.scale) - middle) * drift
        if (below and turn > 0) or (above and turn < 0):
            return True
    return False


def power(hp: float) -> str:
    """A log2 value for people: ``2^-10``."""
    return f"2^{hp:.4g}"
