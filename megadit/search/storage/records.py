"""What the database of a study holds of a trial, as records; the names of its attributes are known here alone.

A trial of the plan is one or more optuna trials, one per attempt: an attempt whose worker died stays as a failed trial,
and a new one with the same number is enqueued after it. The last attempt says how the trial stands. What optuna has no
field for is in the user attributes of each attempt:

- enqueued: those of ``EnqueuedTrial``;
- claimed: ``worker`` and, under sampler tpe, the point drawn for it as ``hps``;
- lost (its worker died or gave it back): ``lost``, the reason, and ``uncounted`` where it does not count as a failure;
- finished: ``result``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, ValidationError

from megadit.search.results import TrialResult
from megadit.search.storage.identity import WorkerId
from megadit.search.study.plan import PlannedTrial

_STRICT = ConfigDict(strict=True, extra="forbid")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
class EnqueuedTrial:
    """What identifies a trial and its run; ``attempt`` counts from 1. ``key`` and ``number`` are those of its plan."""

    number: int
    key: str
    variant: str
    scale: int | None = None
    hps: dict[str, Any]
    seed: int
    attempt: int = 1

    @classmethod
    def of_plan(cls, planned: PlannedTrial, number: int) -> EnqueuedTrial:
        """The first attempt at a trial of the plan; it keeps ``number`` when the plan grows."""
        cell, hps = planned.cell, dict(planned.hps)
        return cls(number=number, key=planned.key, variant=cell.variant, scale=cell.scale, hps=hps, seed=planned.seed)

    def attributes(self, attempt: int) -> dict[str, Any]:
        """The user attributes with which an attempt is enqueued, in the order in which they are stored."""
        return {field.name: getattr(self, field.name) for field in fields(EnqueuedTrial)} | {"attempt": attempt}


def _by_step(horizons: dict[str, Any]) -> dict[int, Any]:
    return {int(step): scores for step, scores in horizons.items()}  # JSON has texts for keys


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class _StoredResult(TrialResult):
    """A result whose values are held against their types."""

    outcome: Literal["complete", "diverged", "pruned", "failed"]
    horizons: Annotated[dict[int, dict[str, float | None]], BeforeValidator(_by_step)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrialAttempt(EnqueuedTrial):
    """One attempt at a trial; ``trial_id``, ``state`` (a name of optuna's), ``started`` and ``params`` are optuna's."""

    worker: WorkerId | None = None
    lost: str | None = None
    uncounted: bool = False
    result: TrialResult | None = None
    trial_id: int
    state: str
    started: datetime | None
    params: dict[str, Any]

    @classmethod
    def of(cls, trial: Any) -> TrialAttempt:
        """The record in one of optuna's frozen trials.

        Raises:
            ValueError, TypeError: an attribute is not what was stored; a ValueError names trial and field.
        """
        values = {key: value for key, value in trial.user_attrs.items() if key in cls.__dataclass_fields__}
        values |= {"trial_id": trial._trial_id, "state": trial.state.name, "started": trial.datetime_start}
        try:
            if "worker" in values:
                values["worker"] = WorkerId(**values["worker"])
            if "result" in values:
                values["result"] = TrialResult(**vars(_StoredResult(**{"scale": None, **values["result"]})))
            return cls(**values, params=trial.params)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"trial {values.get('number')}: {field}: {first['msg']}") from None

    @property
    def is_waiting(self) -> bool:
        """Whether it is enqueued and no worker has claimed it."""
        return self.state == "WAITING"

    @property
    def is_running(self) -> bool:
        """Whether a worker is said to run it and no result is stored."""
        return self.state == "RUNNING" and self.result is None

    @property
    def is_lost(self) -> bool:
        """Whether it ended without a result."""
        return self.state not in ("WAITING", "RUNNING") and self.result is None

    @property
    def seconds(self) -> float:
        """How long ago it was started."""
        return 0.0 if self.started is None else max(0.0, time.time() - self.started.timestamp())


def lost_attempts(attempts: Sequence[TrialAttempt]) -> int:
    """How many of a trial's attempts were lost and count as failures, since its last result."""
    count = 0
    for attempt in attempts:
        if attempt.result is not None:
            count = 0
        elif attempt.lost is not None and not attempt.uncounted:
            count += 1
    return count
