"""Does a base hyperparameter transfer over width, batch or steps? Algorithms 1 to 3 of arXiv 2505.15270, with numbers.

The paper looks whether the optimum of the loss curves stays where it is. Here the same question is asked of every
scale against the proxy, and of all together.

At each scale, the *regret* is the score at the proxy's best point minus the scale's own best. The scale

- disagrees if the proxy's best point diverges there, or if the regret is above ``max_regret`` of the best score and
  above ``allowance`` standard errors of a difference between two points;
- agrees if the regret is below ``max_regret``, or if it is within the noise and so is the distance of the optima;
- is undecided otherwise: its optimum is open (best point at the end of the grid, nothing measured beyond), it has
  fewer than three stable points, the proxy's best was not measured, noise hides what the hyperparameter does, or
  only the grid is too coarse (a regret at the best point's neighbour while the fitted optima coincide).

Over all scales, the *drift* is the weighted slope of log2 optimum against log2 scale. Its interval wholly beyond
``max_drift`` says no. It is undecided if its interval excludes 0 but not ``max_drift``, or if the uncertainty of the
optimum's way over the scales is more than ``max_blur`` of the range of values that was tried. Where three or more
values cannot be told from the best at any scale, the basin is flat and an undecided place in it does not matter:
so the paper's tables 10 and 11, whose output multipliers of 2^0 to 2^4 do equally well.

One no makes "does not transfer", otherwise one undecided makes "inconclusive". If leaving out up to (n - 1) // 2 of
the n smallest scales makes it "transfers" with the drift itself within ``max_drift``, and the regret at each
left-out scale is above ``max_regret``, then the hyperparameter transfers from there on and those scales are named as
exceptions: the paper's minimum batch and minimum number of steps (its tables 8 and 9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megadit.transfer.estimate import RunScore, ScoreNoise, scale_curves
from megadit.transfer.evidence import Evidence, Limits, ScaleVerdict, beyond

__all__ = ["Limits", "RunScore", "ScaleVerdict", "TransferVerdict", "judge", "worst"]

Answer = Literal["transfers", "does not transfer", "inconclusive"]


@dataclass(frozen=True)
class TransferVerdict:
    """The answer and the numbers that made it. ``best`` and ``best_log2`` hold the value that transfers.

    That is the value with the lowest mean relative regret over the judged scales; where the verdict is not
    "transfers", the proxy's own best. ``drift`` and ``regret`` leave the exceptions out.
    """

    verdict: Answer
    reasons: tuple[str, ...]
    scales: tuple[ScaleVerdict, ...]
    proxy: float | None
    best_log2: float | None
    best: float | None
    drift: float | None
    drift_interval: tuple[float, float] | None
    regret: float | None
    regret_relative: float | None
    noise: ScoreNoise
    lower_is_better: bool
    limits: Limits
    exceptions: tuple[float, ...] = ()
    wider_is_better: bool | None = None
    not_better: tuple[tuple[float, float, float], ...] = ()  # (log2 hp, smaller scale, larger scale)
    labels: Mapping[str, str] = field(default_factory=dict)  # name, scale, hp, score, variant: words for people

    def to_json(self) -> dict[str, Any]:
        """Plain data without NaN or infinities (they become null)."""
        return {
            "verdict": self.verdict,
            "best": _plain(self.best),
            "best_log2": _plain(self.best_log2),
            "drift": _plain(self.drift),
            "drift_interval": None if self.drift_interval is None else [_plain(v) for v in self.drift_interval],
            "regret": _plain(self.regret),
            "regret_relative": _plain(self.regret_relative),
            "proxy": _whole(self.proxy),
            "exceptions": [_whole(scale) for scale in self.exceptions],
            "reasons": list(self.reasons),
            "per_scale": [_scale_json(scale, self) for scale in self.scales],
            "wider_is_better": self.wider_is_better,
            "not_better": [
                {"log2_hp": hp, "scale": _whole(small), "larger_scale": _whole(large)}
                for hp, small, large in self.not_better
            ],
            "noise": {
                "sd": _plain(self.noise.sd),
                "degrees_of_freedom": self.noise.degrees_of_freedom,
                "from": self.noise.source,
            },
            "lower_is_better": self.lower_is_better,
            "limits": dict(vars(self.limits)),
            **{key: value for key, value in self.labels.items() if value},
        }


def _plain(value: float | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def _whole(value: float | None) -> float | int | None:
    """A scale as people write it: 144, not 144.0."""
    return int(value) if value is not None and float(value).is_integer() else value


def _scale_json(scale: ScaleVerdict, verdict: TransferVerdict) -> dict[str, Any]:
    sign = 1.0 if verdict.lower_is_better else -1.0
    optimum = scale.optimum
    found: dict[str, Any] = {
        "scale": _whole(scale.scale),
        "status": scale.status,
        "why": scale.why,
        "exception": scale.exception,
        "best_log2": _plain(scale.best_hp),
        "best_score": _plain(scale.best_score),
        "score_at_proxy_best": _plain(scale.score_at_proxy_best),
        "regret": _plain(scale.regret),
        "regret_relative": _plain(scale.regret_relative),
        "regret_noise": _plain(scale.regret_noise),
        "proxy_best_diverges": scale.regret == math.inf,
    }
    if optimum is not None:
        parabola = optimum.parabola
        found |= {
            "optimum_log2": optimum.at,
            "interval_log2": list(optimum.interval),
            "open": optimum.open,
            "edges": {"low": optimum.curve.low, "high": optimum.curve.high},
            "curvature": None if parabola is None else _plain(sign * parabola.c),
            "points": [
                {
                    "log2_hp": point.hp,
                    "score": sign * point.mean if point.stable else None,
                    "seeds": len(point.scores) + point.diverged,
                    "diverged": point.diverged,
                }
                for point in optimum.curve.points
            ],
        }
    return found


def judge(
    samples: Sequence[RunScore],
    *,
    lower_is_better: bool = True,
    proxy: float | None = None,
    limits: Limits | None = None,
    labels: Mapping[str, str] | None = None,
) -> TransferVerdict:
    """The verdict over all scales of ``samples``.

    Args:
        samples: one per run; a run that diverged has a NaN score.
        lower_is_better: whether a lower score is better.
        proxy: the scale whose optimum is carried to the others; default: the smallest that is no exception.
        limits: tolerances.
        labels: words for people: what ``scale``, ``hp`` and ``score`` are called.
    """
    limits = limits or Limits()
    found = scale_curves(samples, lower_is_better)
    evidence = Evidence(found, lower_is_better, limits, dict(labels or {}))
    scales = list(found)
    whole = _verdict(evidence, scales, proxy)
    if whole.verdict == "transfers":
        return whole
    for count in range(1, (len(scales) - 1) // 2 + 1):
        left_out = scales[:count]
        if proxy in left_out:
            break
        part = _verdict(evidence, scales[count:], proxy)
        limit = evidence.drift_limit(scales[count:])
        if part.verdict != "transfers" or part.drift is None or beyond(abs(part.drift), limit):
            continue
        assert part.proxy is not None
        exceptions = [evidence.compare(scale, part.proxy) for scale in left_out]
        if any(scale.small(limits) for scale in exceptions):
            continue
        marked = tuple(replace(scale, exception=True) for scale in exceptions)
        names = ", ".join(evidence.name(scale) for scale in left_out)
        reasons = [f"transfers from {evidence.name(scales[count])} on; exception: {names}"]
        reasons += [f"{evidence.name(scale.scale)}: {scale.why}" for scale in marked]
        return replace(
            part,
            scales=(*marked, *part.scales),
            exceptions=tuple(left_out),
            reasons=(*reasons, *part.reasons),
        )
    return whole


def _verdict(evidence: Evidence, scales: Sequence[float], proxy: float | None) -> TransferVerdict:
    """The verdict over these scales, exceptions not considered."""
    proxy = proxy if proxy is not None else min(scales, default=None)
    if proxy is None or proxy not in evidence.found:
        raise ValueError(f"proxy {proxy} is not among the scales")
    good = evidence.indistinguishable(scales)
    compared = [evidence.compare(scale, proxy, good) for scale in scales]
    no = [f"{evidence.name(s.scale)}: {s.why}" for s in compared if s.status == "disagrees"]
    unsure = [f"{evidence.name(s.scale)}: {s.why}" for s in compared if s.status == "undecided"]
    if len(scales) < 2:
        unsure.append("only one scale was measured, so nothing says how the optimum moves")
    drift, interval = evidence.drift(scales)
    drift_no, drift_unsure, drift_fine = evidence.judge_drift(scales, drift, interval, good)
    no, unsure = no + drift_no, unsure + drift_unsure
    answer: Answer = "does not transfer" if no else "inconclusive" if unsure else "transfers"
    agreed = [f"{evidence.name(s.scale)}: {s.why}" for s in compared if s.status in ("proxy", "agrees")]
    regrets = [s for s in compared if s.regret is not None and s.status != "proxy"]
    largest = max(regrets, key=lambda s: s.regret or 0.0, default=None)
    relative = [s.regret_relative for s in regrets if s.regret_relative is not None]
    better, violations = evidence.wider(scales)
    proxy_optimum = evidence.optima.get(proxy)
    best = evidence.common(scales) if answer == "transfers" else None
    best = best if best is not None else proxy_optimum.curve.best.hp if proxy_optimum else None
    return TransferVerdict(
        verdict=answer,
        reasons=tuple([*no, *unsure, *agreed, *drift_fine]),
        scales=tuple(compared),
        proxy=proxy,
        best_log2=best,
        best=None if best is None else 2.0**best,
        drift=drift,
        drift_interval=interval,
        regret=largest.regret if largest else None,
        regret_relative=max(relative, default=None),
        noise=evidence.noise,
        lower_is_better=evidence.lower_is_better,
        limits=evidence.limits,
        wider_is_better=better,
        not_better=violations,
        labels=evidence.labels,
    )


def worst(verdicts: Sequence[TransferVerdict]) -> Answer:
    """The answer of several studies together: that of the least favourable one."""
    order: tuple[Answer, ...] = ("transfers", "inconclusive", "does not transfer")
    return max((verdict.verdict for verdict in verdicts), key=order.index)
