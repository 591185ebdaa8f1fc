"""What the database of a study holds of a trial, as records; the names of its attributes are known here alone.

A trial of the plan is one or more optuna trials, one per attempt: an attempt whose worker died stays as a failed trial,
and a new one with the same number is enqueued after it. The last attempt says how the trial stands. What optuna has no
field for is in the user attributes of each attempt:

- enqueued: those of ``PlannedTrial``, and the number of the attempt;
- claimed: ``worker`` and, under sampler tpe, the point drawn for it as ``hps``;
- lost (its worker died or gave it back): ``lost``, the reason, and ``uncounted`` where it does not count as a failure;
- finished: ``result``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from megadit.search.results import TrialResult
from megadit.search.storage.identity import WorkerId
from megadit.search.study.plan import PlannedTrial

_RESULT_KEYS = {field.name for field in fields(TrialResult)} - {"scale"}  # which every stored result has


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class TrialAttempt(PlannedTrial):
    """One attempt at a trial, counted from 1; it keeps its number when the plan grows.

    ``trial_id``, ``state`` (a name of optuna's), ``started`` and ``params`` are optuna's.
    """

    attempt: int = 1
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
        values["params"] = trial.params
        try:
            for name, record in (("worker", WorkerId), ("result", TrialResult)):
                if name in values:
                    values[name] = record(**values[name])
            attempt = cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"trial {values.get('number')}: {field}: {first['msg']}") from None
        missing = _RESULT_KEYS.difference(trial.user_attrs.get("result", _RESULT_KEYS))
        if missing:
            raise ValueError(f"trial {attempt.number}: result: lacks {', '.join(sorted(missing))}")
        return attempt

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
    since_result = itertools.takewhile(lambda attempt: attempt.result is None, reversed(attempts))
    return sum(attempt.lost is not None and not attempt.uncounted for attempt in since_result)
