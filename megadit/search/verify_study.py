"""Verdicts on studies: the runs of a finished study as samples for ``megadit.transfer.verdict``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megadit.errors import UserError, did_you_mean
from megadit.search.results import COMPLETE, DIVERGED, StudyResults, TrialResult
from megadit.search.study.spec import ScoreSpec
from megadit.transfer.ties import lowest, nearest
from megadit.transfer.verdict import Limits, RunScore, TransferVerdict, judge


def verify_study(
    results: StudyResults,
    score: str | None = None,
    variant: str | None = None,
    *,
    hp: str | None = None,
    proxy: float | None = None,
    limits: Limits | None = None,
) -> TransferVerdict:
    """Whether the optimum of a searched hyperparameter transfers over the study's scale.

    With several searched keys (a full grid) one is judged, each of its values at the best of all the others.

    Args:
        results: of a study that has ended.
        score: name of the judged score; default: the study's selection score.
        variant: default: the first.
        hp: the judged key; default: the first of the space.
        proxy: the scale whose optimum is carried to the others; default: the one that the study names (scale.proxy),
            else the smallest that is no exception. ``apply`` chooses at the verdict's proxy.
        limits: tolerances.

    Raises:
        UserError: the study is not complete, has no scale, is a random search over several keys, or the judged key,
            score or variant is not there, is no positive number, or was not measured.
    """
    study = results.study
    name = study.spec.name
    scale = study.spec.scale
    if scale is None:
        raise UserError(f"study {name}: has no scale, so nothing can transfer; add scale.key and scale.values")
    if not results.complete:
        left = f"{len(results.trials)} of {results.planned} trials have ended"
        raise UserError(f"study {name}: is incomplete ({left}); go on with launch/sweep.py run, then verify")
    variant = _one_of("--variant", variant, study.variants)
    scores = [each.name for each in study.spec.scores]
    judged = study.spec.score(_one_of("--score", score or study.spec.selection_score.name, scores))
    key = _one_of("--hp", hp, study.space.keys)
    if len(study.space.keys) > 1 and study.spec.sampler != "grid":
        raise UserError(
            f"study {name}: sampler {study.spec.sampler} over {len(study.space.keys)} keys gives no curve of one of "
            f"them; search {key} alone, or use sampler: grid"
        )
    at = scale.proxy if proxy is None else proxy
    if at is not None and at not in scale.values:
        raise UserError(f"--proxy: {at:g} is not among the values {list(scale.values)} of {scale.key}; choose one")
    observations = results.observations(variant)
    counted = [run for run in observations if run.outcome in (COMPLETE, DIVERGED)]
    runs = _run_scores(counted, key, judged, name)
    if not runs:
        raise UserError(f"study {name}: no trial has a value of {judged.name}; see launch/sweep.py status for why")
    proxy = scale.proxy_value if at is None else at
    if not any(run.scale == proxy for run in runs):
        raise UserError(f"study {name}: no trial at the proxy, {scale.key} {proxy:g}, has ended well; run it again")
    labels = {"study": name, "variant": variant, "scale": scale.key, "hp": key, "score": judged.name}
    verdict = judge(runs, lower_is_better=judged.lower_is_better, proxy=at, limits=limits, labels=labels)
    if others := ", ".join(other for other in study.space.keys if other != key):
        verdict.reasons += (f"each value of {key} is taken at the best of {others}",)
    if left_out := len(observations) - len(counted):
        verdict.reasons += (f"{left_out} runs that failed or were pruned are left out",)
    verdict.best = nearest({float(run.hps[key]) for run in counted}, verdict.best_log2)
    return verdict


def proxy_of(results: StudyResults, verdict: TransferVerdict | None) -> int | None:
    """The scale at which to choose: the verdict's proxy where the study's own smallest scale is an exception to it."""
    if verdict is None or verdict.verdict != "transfers":
        return results.study.proxy_scale
    return int(verdict.proxy)


def _one_of(option: str, value: str | None, names: Sequence[str]) -> str:
    if value is None:
        return names[0]
    if value not in names:
        remedy = did_you_mean(value, names, f"choose one of {', '.join(filter(None, names)) or 'none'}")
        raise UserError(f"{option}: the study has no {value}; {remedy}")
    return value


def _run_scores(observations: Sequence[TrialResult], key: str, score: ScoreSpec, name: str) -> list[RunScore]:
    """One sample per run; with further keys, of each value's best combination with the others."""
    groups: dict[tuple[float, float], dict[str, list[RunScore]]] = {}
    for run in observations:
        value = run.hps[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{key}: {value!r} is not a positive number, so it has no log2; search positive values")
        measured = run.scores.get(score.name)
        if run.outcome == COMPLETE and measured is None:
            raise UserError(
                f"study {name}: trial {run.number} has no value of {score.name}; choose another --score, or run it "
                "again"
            )
        assert run.scale is not None, "observations have a scale"
        number = math.nan if run.outcome == DIVERGED or measured is None else float(measured)
        others = repr(sorted((other, value) for other, value in run.hps.items() if other != key))
        sample = RunScore(float(run.scale), math.log2(value), run.seed, number)
        groups.setdefault((sample.scale, sample.hp), {}).setdefault(others, []).append(sample)

    def mean_score(runs: list[RunScore]) -> float:
        mean = score.sign * sum(run.score for run in runs) / len(runs)
        return mean if math.isfinite(mean) else math.inf

    return [run for combinations in groups.values() for run in lowest(combinations.values(), mean_score)]
