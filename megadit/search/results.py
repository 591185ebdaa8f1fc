"""What a study has found so far: the outcome of every trial, and the observations that verdicts are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megadit.search.study.study import Study

COMPLETE, DIVERGED, PRUNED, FAILED = "complete", "diverged", "pruned", "failed"


@dataclass(frozen=True)
class TrialResult:
    """A finished trial. Scores are None where they are not finite or were not measured.

    ``horizons``: the scores at each step count, {} unless one run scores several. ``flops`` are those executed
    (3 x forward x batch x steps), ``seconds`` the whole trial, ``overhead_s`` what of it was not training.
    """

    number: int
    variant: str
    scale: float | None
    hps: dict[str, Any]
    seed: int
    outcome: str
    scores: dict[str, float | None]
    horizons: dict[int, dict[str, float | None]] = field(default_factory=dict)
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
class Observation:
    """The scores of one point in one run at one scale value; a run that scores several horizons gives several."""

    variant: str
    scale: float
    hps: dict[str, Any]
    seed: int
    scores: dict[str, float | None]
    outcome: str
    number: int = -1


@dataclass(frozen=True)
class TrialCounts:
    """How the trials of a plan stand."""

    planned: int
    waiting: int
    running: int
    complete: int
    diverged: int
    pruned: int
    failed: int

    @property
    def done(self) -> int:
        """Trials that have ended, in whatever way."""
        return self.complete + self.diverged + self.pruned + self.failed

    @property
    def ended_well(self) -> int:
        """Trials that have ended and did not fail."""
        return self.done - self.failed


@dataclass(frozen=True)
class StudyResults:
    """A study with its finished trials and how many runs are planned, running and waiting."""

    study: Study
    trials: tuple[TrialResult, ...]
    planned: int
    running: int
    waiting: int

    @property
    def complete(self) -> bool:
        """Whether every planned run has ended, in whatever way."""
        return len(self.trials) >= self.planned and not self.running and not self.waiting

    @property
    def counts(self) -> TrialCounts:
        """How many trials stand how."""
        ended = Counter(trial.outcome for trial in self.trials)
        return TrialCounts(
            self.planned, self.waiting, self.running, *(ended[name] for name in (COMPLETE, DIVERGED, PRUNED, FAILED))
        )

    def observations(self, variant: str | None = None) -> list[Observation]:
        """One per finished trial, or per trial and horizon; of ``variant`` alone when it is named.

        In a study without scale, ``scale`` is the base's width.
        """
        wanted = [trial for trial in self.trials if variant in (None, trial.variant)]
        return [observation for trial in wanted for observation in self._of(trial)]

    def _of(self, trial: TrialResult) -> list[Observation]:
        scale = float(self.study.base.model.width if trial.scale is None else trial.scale)
        whole = Observation(trial.variant, scale, trial.hps, trial.seed, trial.scores, trial.outcome, trial.number)
        horizons = self.study.horizons
        if not horizons:
            return [whole]
        return [
            whole if horizon == horizons[-1] else replace(whole, scale=float(horizon), **_at_horizon(trial, horizon))
            for horizon in horizons
        ]


def _at_horizon(trial: TrialResult, horizon: int) -> dict[str, Any]:
    """Scores and outcome at a horizon before the end.

    A run that diverged later was fine when it passed; one that came back later had diverged there.
    """
    scores = trial.horizons.get(horizon, {})
    passed = bool(scores) and all(score is not None for score in scores.values())
    missing: dict[str, float | None] = dict.fromkeys(trial.scores)
    late = DIVERGED if trial.outcome == COMPLETE else trial.outcome
    return {"scores": scores or missing, "outcome": COMPLETE if passed else late}
