"""Choosing one point of a study by a named rule: best, mean_rank or conservative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadit.errors import UserError
from megadit.search.results import ScoredPoint, StudyResults
from megadit.search.study.spec import ScoreSpec
from megadit.transfer.ties import at_most, lowest, ranks

SelectionRule = Callable[[Sequence[ScoredPoint], ScoreSpec, Sequence[ScoreSpec]], ScoredPoint]


@dataclass(frozen=True)
class SelectedPoint:
    """The point that a rule chose: ``value`` is the mean of ``score`` over its ``seeds``, ``trials`` its runs."""

    rule: str
    score: str
    value: float
    seeds: int
    trials: tuple[int, ...]
    hps: dict[str, Any]


def select(results: StudyResults, variant: str | None = None, scale: float | None = None) -> SelectedPoint:
    """The point that the study's rule chooses; of the judged variant at the proxy's scale by default.

    A point with a run that diverged, failed or was pruned, or with fewer seeds than others have, never wins.

    Raises:
        UserError: no point is left.
    """
    spec = results.study.spec
    variant = results.study.variants[0] if variant is None else variant
    scale = results.study.proxy_scale if scale is None else scale
    score = spec.selection_score
    # mean_rank compares all scores; the other rules need their own alone.
    scores = spec.scores if spec.select.rule == "mean_rank" else (score,)
    points = [p for p in results.points() if p.variant == variant and scale in (None, p.scale)]
    scored = [point for point in points if all(point.mean(each.name) is not None for each in scores)]
    if not scored:
        where = f"variant {variant}" if variant else "the study"
        where += "" if scale is None else f" at {scale:g}"
        ended = sum(len(point.runs) for point in points)
        raise UserError(
            f"study {spec.name}: no point of {where} has finished well ({ended} runs ended); let it run on, or widen "
            "the space"
        )
    seeds = max(len(point.runs) for point in scored)
    candidates = [point for point in scored if len(point.runs) == seeds]
    chosen = _RULES[spec.select.rule](candidates, score, scores)
    value = score.sign * _loss(chosen, score)
    return SelectedPoint(spec.select.rule, score.name, value, seeds, chosen.trials, chosen.hps)


def _loss(point: ScoredPoint, score: ScoreSpec) -> float:
    """The point's mean score with the sign that makes lower better."""
    mean = point.mean(score.name)
    assert mean is not None
    return score.sign * mean


def _best(candidates: Sequence[ScoredPoint], score: ScoreSpec, scores: Sequence[ScoreSpec]) -> ScoredPoint:
    return lowest(candidates, lambda point: _loss(point, score))


def _mean_rank(candidates: Sequence[ScoredPoint], score: ScoreSpec, scores: Sequence[ScoreSpec]) -> ScoredPoint:
    """Lowest mean rank over all scores; equal scores share their mean rank, and the rule's own score breaks ties."""
    total = np.sum([ranks([_loss(point, each) for point in candidates]) for each in scores], axis=0)
    first = np.flatnonzero(total == total.min())  # halves: exact
    return _best([candidates[int(index)] for index in first], score, scores)


def _conservative(candidates: Sequence[ScoredPoint], score: ScoreSpec, scores: Sequence[ScoreSpec]) -> ScoredPoint:
    """Of the points within one standard error (over seeds) of the best, the smallest first hyperparameter.

    Away from the stability edge, which lies above the optimum of a learning rate and close to it.
    """
    best = _best(candidates, score, scores)
    least = _loss(best, score)
    error = (best.spread(score.name) or 0.0) / math.sqrt(len(best.runs))
    near = [point for point in candidates if at_most(_loss(point, score), least + error, least)]
    key = next(iter(best.hps))  # numeric: another is refused with the study
    smallest = min(point.hps[key] for point in near)
    return _best([point for point in near if point.hps[key] == smallest], score, scores)


_RULES: dict[str, SelectionRule] = {"best": _best, "mean_rank": _mean_rank, "conservative": _conservative}
