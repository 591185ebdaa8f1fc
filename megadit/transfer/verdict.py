"""Does a base hyperparameter transfer over width, batch or steps? Algorithms 1 to 3 of arXiv 2505.15270, with numbers.

The paper looks whether the optimum of the loss curves stays where it is. Here the same question is asked of every
scale against the proxy (its *regret*: the score at the proxy's best value minus the scale's own best), and of the
*drift*, the slope of log2 optimum against log2 scale. ``megadit.transfer.evidence`` has the two decision tables.

One "disagrees" makes "does not transfer", otherwise one "undecided" makes "inconclusive". If leaving out up to
(n - 1) // 2 of the n smallest scales makes it "transfers" with the drift itself within ``max_drift``, and the regret at
each left-out scale is above ``max_regret``, then the hyperparameter transfers from there on and those scales are named
as exceptions: the paper's minimum batch and minimum number of steps (its tables 8 and 9). Where three or more values
cannot be told from the best at any scale, the basin is flat and an undecided place in it does not matter: so the
paper's tables 10 and 11, whose output multipliers of 2^0 to 2^4 do equally well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Literal, get_args

from megadit.files.json_text import null_nonfinite
from megadit.transfer.estimate import RunScore
from megadit.transfer.evidence import DRIFT_RULES, DriftComparison, Evidence, Limits, ScaleVerdict, Status, decide

__all__ = ["Limits", "RunScore", "ScaleVerdict", "TransferVerdict", "judge", "worst"]

Answer = Literal["does not transfer", "inconclusive", "transfers"]  # the least favourable first
_ANSWERS: Mapping[Status, Answer] = MappingProxyType(
    {"disagrees": "does not transfer", "undecided": "inconclusive", "agrees": "transfers", "proxy": "transfers"}
)
_ORDER: tuple[Answer, ...] = get_args(Answer)


class TransferVerdict:
    """The answer over ``scales`` and the numbers that made it, before any scale is taken for an exception.

    ``best`` and ``best_log2`` hold the value that transfers: the one with the lowest mean relative regret over the
    judged scales; where the verdict is not "transfers", the proxy's own best. ``drift`` and ``regret`` leave the
    exceptions out. ``not_better``: (log2 hp, smaller scale, larger scale) where larger is not better.
    """

    def __init__(self, evidence: Evidence, scales: Sequence[float], proxy: float) -> None:
        self.evidence, self.proxy = evidence, proxy
        flat_basin = evidence.flat_basin(scales)
        self.scales = tuple(ScaleVerdict(evidence, scale, proxy, flat_basin) for scale in scales)
        self.exceptions: tuple[float, ...] = ()
        findings = [(s.status, f"{evidence.name(s.scale)}: {s.why}") for s in self.scales]
        if len(scales) < 2:
            findings.append(("undecided", "only one scale was measured, so nothing says how the optimum moves"))
        comparison = DriftComparison(evidence, scales, flat_basin)
        self.drift, self.drift_interval, self.drift_within = comparison.drift, comparison.interval, comparison.within
        if self.drift is not None:
            findings.append(decide(DRIFT_RULES, comparison))
        findings.sort(key=lambda finding: _ORDER.index(_ANSWERS[finding[0]]))
        self.verdict, self.reasons = _ANSWERS[findings[0][0]], tuple(why for _, why in findings)
        others = [s for s in self.scales if s.status != "proxy"]
        self.regret = max((s.regret for s in others if s.regret is not None), default=None)
        self.regret_relative = max((s.regret_relative for s in others if s.regret_relative is not None), default=None)
        self.wider_is_better, self.not_better = evidence.larger_is_better(scales)
        self.best_log2 = evidence.best_common(scales) if self.verdict == "transfers" else None
        if self.best_log2 is None and proxy in evidence.optima:
            self.best_log2 = evidence.optima[proxy].curve.best.hp
        self.best = None if self.best_log2 is None else 2.0**self.best_log2

    def to_json(self) -> dict[str, Any]:
        """Plain data without NaN or infinities (they become null)."""
        noise, evidence = self.evidence.noise, self.evidence
        names = ("verdict", "best", "best_log2", "drift", "drift_interval", "regret", "regret_relative")
        plain = {name: getattr(self, name) for name in names} | {
            "proxy": _integer(self.proxy),
            "exceptions": [_integer(scale) for scale in self.exceptions],
            "reasons": self.reasons,
            "per_scale": [_scale_json(scale, evidence.sign) for scale in self.scales],
            "wider_is_better": self.wider_is_better,
            "not_better": [
                {"log2_hp": hp, "scale": _integer(small), "larger_scale": _integer(large)}
                for hp, small, large in self.not_better
            ],
            "noise": {"sd": noise.sd, "degrees_of_freedom": noise.degrees_of_freedom, "from": noise.source},
            "lower_is_better": evidence.lower_is_better,
            "limits": asdict(evidence.limits),
        }
        return dict(null_nonfinite(plain | {key: value for key, value in evidence.labels.items() if value}))


def _integer(scale: float) -> float | int:
    """A scale as people write it: 144, not 144.0."""
    return int(scale) if float(scale).is_integer() else scale


def _scale_json(scale: ScaleVerdict, sign: float) -> dict[str, Any]:
    optimum, names = scale.optimum, ("status", "why", "exception", "best_log2", "best_score", "score_at_proxy_best")
    plain = {"scale": _integer(scale.scale)}
    plain |= {name: getattr(scale, name) for name in (*names, "regret", "regret_relative", "regret_noise")}
    plain["proxy_best_diverges"] = scale.regret == math.inf
    if optimum is None:
        return plain
    return plain | {
        "optimum_log2": optimum.at,
        "interval_log2": optimum.interval,
        "open": optimum.open,
        "edges": {"low": optimum.curve.low, "high": optimum.curve.high},
        "curvature": None if optimum.parabola is None else sign * optimum.parabola.c,
        "points": [
            {
                "log2_hp": point.hp,
                "score": sign * point.mean if point.stable else None,
                "seeds": point.runs,
                "diverged": point.diverged,
            }
            for point in optimum.curve.points
        ],
    }


def judge(
    runs: Sequence[RunScore],
    *,
    lower_is_better: bool = True,
    proxy: float | None = None,
    limits: Limits | None = None,
    labels: Mapping[str, str] | None = None,
) -> TransferVerdict:
    """The verdict over all scales of ``runs``.

    Args:
        runs: their scores; NaN for one that diverged.
        lower_is_better: whether a lower score is better.
        proxy: the scale whose optimum is carried to the others; default: the smallest that is no exception.
        limits: tolerances.
        labels: words for people: what ``scale``, ``hp`` and ``score`` are called.
    """
    evidence = Evidence(runs, lower_is_better, limits or Limits(), labels or {})
    scales = list(evidence.curves)
    if not scales or proxy not in (None, *scales):
        raise ValueError(f"proxy {proxy} is not among the scales")
    complete = TransferVerdict(evidence, scales, scales[0] if proxy is None else proxy)
    if complete.verdict == "transfers":
        return complete
    for count in range(1, (len(scales) - 1) // 2 + 1):
        left_out, remaining = scales[:count], scales[count:]
        if proxy in left_out:
            break
        reduced = TransferVerdict(evidence, remaining, remaining[0] if proxy is None else proxy)
        if reduced.verdict != "transfers" or not reduced.drift_within:
            continue
        compared = [ScaleVerdict(evidence, scale, reduced.proxy, exception=True) for scale in left_out]
        if any(scale.small for scale in compared):
            continue
        names = [evidence.name(scale) for scale in left_out]
        reasons = [f"transfers from {evidence.name(remaining[0])} on; exception: {', '.join(names)}"]
        reasons += [f"{name}: {scale.why}" for name, scale in zip(names, compared, strict=True)]
        reduced.scales, reduced.reasons = (*compared, *reduced.scales), (*reasons, *reduced.reasons)
        reduced.exceptions = tuple(left_out)
        return reduced
    return complete


def worst(verdicts: Sequence[TransferVerdict]) -> Answer:
    """The answer of several studies together: that of the least favourable one."""
    return min((verdict.verdict for verdict in verdicts), key=_ORDER.index)
