"""Choosing one point of a study by a named rule: best, mean_rank or conservative."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadit.errors import UserError
from megadit.search.results import COMPLETE, Observation, StudyResults
from megadit.search.study.spec import ScoreSpec
from megadit.transfer.ties import at_most, lowest, ranks


@dataclass(frozen=True)
class SelectedPoint:
    """The point that a rule chose: ``value`` is the mean of ``score`` over its ``seeds``, ``trials`` its runs."""

    hps: dict[str, Any]
    rule: str
    score: str
    value: float
    seeds: int
    trials: tuple[int, ...]


@dataclass(frozen=True)
class _Candidate:
    """A point all of whose runs ended well; ``losses``: per score and seed, sign turned where higher is better."""

    hps: dict[str, Any]
    losses: Mapping[str, Sequence[float]]
    trials: tuple[int, ...]

    def mean(self, score: str) -> float:
        return statistics.fmean(self.losses[score])


def select(results: StudyResults, variant: str | None = None, scale: float | None = None) -> SelectedPoint:
    """The point that the study's rule chooses, of the judged variant at the proxy's scale unless told otherwise.

    A point with a run that diverged, failed or was pruned, or with fewer seeds than others have, never wins.
    Raises UserError when no point is left.
    """
    spec = results.study.spec
    variant = results.study.variants[0] if variant is None else variant
    scale = results.study.proxy_scale if scale is None else scale
    score = spec.selection_score
    # mean_rank looks at all scores; the others need no more than theirs.
    scores = spec.scores if spec.select.rule == "mean_rank" else (score,)
    observations = [o for o in results.observations(variant) if scale is None or o.scale == scale]
    candidates = _candidates(observations, scores)
    if not candidates:
        where = f"variant {variant}" if variant else "the study"
        where += "" if scale is None else f" at {scale:g}"
        raise UserError(
            f"study {spec.name}: no point of {where} has finished well ({len(observations)} runs ended); let it run "
            "on, or widen the space"
        )
    chosen = _RULES[spec.select.rule](candidates, score, scores)
    return SelectedPoint(
        hps=chosen.hps,
        rule=spec.select.rule,
        score=score.name,
        value=score.sign * chosen.mean(score.name),
        seeds=len(chosen.trials),
        trials=chosen.trials,
    )


def _candidates(observations: Sequence[Observation], scores: Sequence[ScoreSpec]) -> list[_Candidate]:
    """The points whose runs all ended well, with as many seeds as any point has."""
    points: dict[str, list[Observation]] = {}
    for observation in observations:
        points.setdefault(json.dumps(observation.hps, sort_keys=True), []).append(observation)
    found = []
    for runs in points.values():
        losses = {score.name: [score.sign * _number(run.scores.get(score.name)) for run in runs] for score in scores}
        finite = all(math.isfinite(loss) for values in losses.values() for loss in values)
        if finite and all(run.outcome == COMPLETE for run in runs):
            found.append(_Candidate(runs[0].hps, losses, tuple(run.number for run in runs)))
    most = max((len(candidate.trials) for candidate in found), default=0)
    return [candidate for candidate in found if len(candidate.trials) == most]


def _best(candidates: list[_Candidate], score: ScoreSpec, scores: Sequence[ScoreSpec]) -> _Candidate:
    return lowest(candidates, lambda candidate: candidate.mean(score.name))


def _mean_rank(candidates: list[_Candidate], score: ScoreSpec, scores: Sequence[ScoreSpec]) -> _Candidate:
    """Lowest mean rank over all scores; equals share their mean rank, and the rule's own score breaks ties."""
    total = np.sum([ranks([candidate.mean(each.name) for candidate in candidates]) for each in scores], axis=0)
    first = np.flatnonzero(total == total.min())  # halves: exact
    return _best([candidates[index] for index in first], score, scores)


def _conservative(candidates: list[_Candidate], score: ScoreSpec, scores: Sequence[ScoreSpec]) -> _Candidate:
    """Of the points within one standard error (over seeds) of the best, the smallest first hyperparameter.

    Away from the stability edge, which lies above the optimum of a learning rate and close to it.
    """
    best = _best(candidates, score, scores)
    losses = best.losses[score.name]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    least = best.mean(score.name)
    near = [candidate for candidate in candidates if at_most(candidate.mean(score.name), least + error, least)]
    first = next(iter(best.hps))
    smallest = min(_number(candidate.hps[first]) for candidate in near)
    return _best([candidate for candidate in near if _number(candidate.hps[first]) <= smallest], score, scores)


_RULES = {"best": _best, "mean_rank": _mean_rank, "conservative": _conservative}


def _number(value: Any) -> float:
    """A score or a value as a number; nan for what is none."""
    return float(value) if isinstance(value, int | float) else math.nan
