"""What a study's storage holds of a trial: a claim on it, the starts it has had, and its result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megadit.search.results import COMPLETE, DIVERGED, FAILED, PRUNED, StudyResults, TrialResult
from megadit.search.storage.identity import WorkerId
from megadit.search.study.plan import PlannedTrial


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that a worker is to run; ``attempt`` counts from 1. ``trial_id`` is optuna's."""

    number: int
    attempt: int
    variant: str
    scale: int | None
    hps: dict[str, Any]
    seed: int
    trial_id: int


@dataclass(frozen=True)
class RunningTrial:
    """A trial that is being run, by whom and since when (seconds)."""

    number: int
    variant: str
    scale: int | None
    worker: str
    seconds: float


@dataclass(frozen=True)
class StudySnapshot:
    """A study's trials at one moment: what has ended, and what runs, by number."""

    results: StudyResults
    running: tuple[RunningTrial, ...]


@dataclass
class TrialHistory:
    """All starts of one trial, as optuna's frozen trials, in order."""

    starts: list[Any]

    @property
    def last(self) -> Any:
        """The last start, which says how the trial stands."""
        return self.starts[-1]

    @property
    def number(self) -> int:
        """The planned number; kept when the plan grows."""
        return int(self.last.user_attrs["number"])

    @property
    def outcome(self) -> str | None:
        """How the trial ended; None while it has not."""
        if "result" not in self.last.user_attrs:
            return None
        return str(self.last.user_attrs["result"]["outcome"])

    @property
    def is_waiting(self) -> bool:
        """Whether it is queued."""
        return bool(self.last.state.name == "WAITING")

    @property
    def is_running(self) -> bool:
        """Whether a worker is said to run it and no result is stored."""
        return self.last.state.name == "RUNNING" and self.outcome is None

    @property
    def is_lost(self) -> bool:
        """Whether its last start ended without a result."""
        return self.last.state.is_finished() and self.outcome is None

    @property
    def lost_attempts(self) -> int:
        """Starts that were lost and count, since the last result."""
        count = 0
        for trial in self.starts:
            if "result" in trial.user_attrs:
                count = 0
            elif "lost" in trial.user_attrs and "uncounted" not in trial.user_attrs:
                count += 1
        return count

    def running(self) -> RunningTrial:
        """Who runs it; it must be running."""
        attrs, start = self.last.user_attrs, self.last.datetime_start
        label = WorkerId.from_json(attrs["worker"]).label if "worker" in attrs else "?"
        seconds = 0.0 if start is None else max(0.0, time.time() - start.timestamp())
        return RunningTrial(self.number, attrs["variant"], attrs["scale"], label, seconds)

    def result(self) -> TrialResult:
        """The result; there must be one."""
        return restored(self.last.user_attrs["result"])


def attributes(planned: PlannedTrial, number: int) -> dict[str, Any]:
    """What identifies a trial, as stored beside each of its starts."""
    return {
        "number": number,
        "key": planned.key,
        "variant": planned.cell.variant,
        "scale": planned.cell.scale,
        "hps": dict(planned.hps),
        "seed": planned.seed,
    }


_NUMBER = (int, float)
_START = {"number": int, "variant": str, "seed": int, "hps": dict}
_RESULT: dict[str, type | tuple[type, ...]] = {
    "number": int, "variant": str, "hps": dict, "seed": int, "outcome": str, "scores": dict, "horizons": dict,
    "steps": int, "global_batch": int, "parameters": int, "flops": _NUMBER, "seconds": _NUMBER, "overhead_s": _NUMBER,
    "reason": str, "run_dir": str, "attempts": int,
}  # fmt: skip
_OUTCOMES = (COMPLETE, DIVERGED, PRUNED, FAILED)


def check_start(attrs: Mapping[str, Any]) -> None:
    """Whether what is stored of a start of a trial is what ``attributes``, ``stored`` and a worker's claim wrote.

    Raises:
        ValueError: it is not; what is wrong is named.
    """
    trial = f"trial {attrs.get('number')}"
    _check(attrs, _START, trial)
    if "worker" in attrs:
        WorkerId.from_json(attrs["worker"])
    if "lost" in attrs:
        _check(attrs, {"lost": str}, trial)
    if "result" in attrs:
        result = attrs["result"]
        _check(result, _RESULT, f"the result of {trial}")
        if result["outcome"] not in _OUTCOMES:
            raise ValueError(f"the result of {trial} has the outcome {result['outcome']!r}")
        if result.keys() - _RESULT.keys() - {"scale"}:
            raise ValueError(f"the result of {trial} has keys that are not known")
        for step, scores in {"0": result["scores"], **result["horizons"]}.items():
            if not step.isdecimal() or not isinstance(scores, dict) or not all(map(_is_score, scores.values())):
                raise ValueError(f"the result of {trial} has scores that are no numbers")


def _check(values: Any, wanted: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is no object")
    for key, kind in wanted.items():
        if not isinstance(values.get(key), kind) or isinstance(values[key], bool):
            raise ValueError(f"{key} of {what} is {values.get(key)!r}")
    if not (values.get("scale") is None or isinstance(values["scale"], _NUMBER)):
        raise ValueError(f"scale of {what} is {values['scale']!r}")


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, _NUMBER) and not isinstance(value, bool))


def stored(result: TrialResult) -> dict[str, Any]:
    """The result as JSON values."""
    values = asdict(result)
    values["horizons"] = {str(step): scores for step, scores in result.horizons.items()}
    return values


def restored(values: Mapping[str, Any]) -> TrialResult:
    """The inverse of ``stored``."""
    horizons = {int(step): scores for step, scores in values["horizons"].items()}
    return TrialResult(**{"scale": None, **values, "horizons": horizons})
