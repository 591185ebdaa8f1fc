"""The results of a study so far: the outcome of every trial, its scores by scale, and their means over seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, Field

from megadit.search.study.study import Study

OUTCOMES = COMPLETE, DIVERGED, PRUNED, FAILED = "complete", "diverged", "pruned", "failed"


def _step(key: Any) -> Any:
    """A step count; JSON has texts for keys, of which only decimal numbers are step counts."""
    return int(key) if str(key).isdecimal() else key


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class TrialResult:
    """A finished trial. Scores are None where they are not finite or were not measured.

    ``horizons``: the scores at each step count, {} unless one run scores several. ``flops`` are those executed
    (3 x forward x batch x steps), ``seconds`` the whole trial, ``overhead_s`` what of it was not training.
    """

    number: int
    variant: str
    scale: int | float | None = None
    hps: dict[str, Any]
    seed: int
    outcome: Annotated[str, Field(pattern=f"^({'|'.join(OUTCOMES)})$")]
    scores: dict[str, float | None]
    horizons: dict[Annotated[int, BeforeValidator(_step)], dict[str, float | None]] = field(default_factory=dict)
    steps: int = 0
    global_batch: int = 0
    parameters: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    overhead_s: float = 0.0
    reason: str = ""
    run_dir: str = ""
    attempts: int = 1

    @classmethod
    def failed(cls, study: Study, trial: Mapping[str, Any], reason: str, attempts: int) -> TrialResult:
        """A result without scores of a ``trial`` that has number, variant, scale, hps and seed."""
        return cls(
            **{key: trial[key] for key in ("number", "variant", "scale", "hps", "seed")},
            outcome=FAILED,
            scores=dict.fromkeys(score.name for score in study.spec.scores),
            reason=reason,
            run_dir=str(study.trial_folder(trial["number"])),
            attempts=attempts,
        )


@dataclass(frozen=True)
class RunningTrial:
    """A trial that is being run: the label of its worker, and for how many seconds."""

    number: int
    variant: str
    scale: int | None
    worker: str
    seconds: float


@dataclass(frozen=True)
class ScoredPoint:
    """One assignment of the hyperparameters at one scale value, with its observations under each seed (``runs``)."""

    variant: str
    scale: float
    hps: dict[str, Any]
    runs: tuple[TrialResult, ...]

    @property
    def diverged(self) -> int:
        """How many of its runs diverged."""
        return sum(run.outcome == DIVERGED for run in self.runs)

    @property
    def comparable(self) -> bool:
        """Whether no run was pruned or failed; some may have diverged."""
        return all(run.outcome in (COMPLETE, DIVERGED) for run in self.runs)

    @property
    def trials(self) -> tuple[int, ...]:
        """The numbers of its trials."""
        return tuple(run.number for run in self.runs)

    def scores(self, name: str) -> list[float]:
        """The finite scores of its complete runs."""
        scores = (run.scores.get(name) for run in self.runs if run.outcome == COMPLETE)
        return [score for score in scores if score is not None and math.isfinite(score)]

    def mean(self, name: str) -> float | None:
        """Mean over seeds; None unless every run has a score: a point that diverges under one seed is not usable."""
        scores = self.scores(name)
        return statistics.fmean(scores) if len(scores) == len(self.runs) else None

    def spread(self, name: str) -> float | None:
        """Standard deviation between seeds; None for fewer than two scores."""
        scores = self.scores(name)
        return statistics.stdev(scores) if len(scores) > 1 else None


@dataclass(frozen=True)
class StudyResults:
    """A study at one moment: its finished trials and those that are being run, of how many that are planned."""

    study: Study
    trials: tuple[TrialResult, ...]
    planned: int
    running: tuple[RunningTrial, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every planned run has ended, in whatever way."""
        return len(self.trials) >= self.planned

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are planned, waiting, running, of each outcome, and done: ended, in whatever way."""
        done, running = len(self.trials), len(self.running)
        ended = Counter(trial.outcome for trial in self.trials)
        present = {"planned": self.planned, "waiting": self.planned - running - done, "running": running}
        return present | {outcome: ended[outcome] for outcome in OUTCOMES} | {"done": done}

    def observations(self, variant: str | None = None) -> list[TrialResult]:
        """One per finished trial, or per trial and horizon, with its scores there; of ``variant`` alone when named.

        Each has a scale: its horizon, or the base's width in a study without scale.
        """
        trials = [trial for trial in self.trials if variant in (None, trial.variant)]
        return [observation for trial in trials for observation in self._observations_of(trial)]

    def points(self) -> list[ScoredPoint]:
        """All observations pooled over seeds, in the order of variants, scale values and first trials."""
        groups: dict[tuple[str, float, str], list[TrialResult]] = {}
        for run in sorted(self.observations(), key=lambda run: run.number):
            groups.setdefault((run.variant, float(run.scale or 0), repr(sorted(run.hps.items()))), []).append(run)
        points = [ScoredPoint(variant, scale, runs[0].hps, tuple(runs)) for (variant, scale, _), runs in groups.items()]
        order = {variant: index for index, variant in enumerate(self.study.variants)}
        return sorted(points, key=lambda point: (order.get(point.variant, len(order)), point.scale))

    def _observations_of(self, trial: TrialResult) -> list[TrialResult]:
        at_end = replace(trial, scale=float(self.study.base.model.width if trial.scale is None else trial.scale))
        return [*(_at_horizon(trial, horizon) for horizon in self.study.horizons[:-1]), at_end]


def _at_horizon(trial: TrialResult, horizon: int) -> TrialResult:
    """The trial as it stood at a horizon before the end.

    A run that diverged later was fine when it passed; one that came back later had diverged there.
    """
    scores = trial.horizons.get(horizon, {})
    passed = bool(scores) and all(score is not None for score in scores.values())
    late = DIVERGED if trial.outcome == COMPLETE else trial.outcome
    outcome = COMPLETE if passed else late
    return replace(trial, scale=float(horizon), scores=scores or dict.fromkeys(trial.scores), outcome=outcome)
