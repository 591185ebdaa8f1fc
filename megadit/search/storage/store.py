"""The trials of a study in optuna's storage, and the operations on them that several workers may do at once."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megadit.errors import UserError
from megadit.search.results import DIVERGED, FAILED, PRUNED, RunningTrial, StudyResults, TrialResult
from megadit.search.storage.cells import open_cell, suggest_by_tpe
from megadit.search.storage.identity import Heartbeats, WorkerId
from megadit.search.storage.locking import FILES, damage_as_user_error, open_storage, study_lock
from megadit.search.storage.records import TrialAttempt, lost_attempts
from megadit.search.study.plan import PlannedTrial, plan_trials
from megadit.search.study.study import Study, check_against_frozen, load_study, make_folder, save_study

_UNOWNED_S = 60.0  # a running trial without a worker for so long was claimed by a process that died at once


class StudyStore:
    """The trials of one study. Every method that writes holds the study's lock, whoever else works on it."""

    def __init__(self, study: Study, *, create: bool) -> None:
        folder, kind = study.folder, study.spec.storage
        self.study = study
        self.heartbeats = Heartbeats(folder / "workers")
        self._file = folder / FILES[kind]
        self._storage = open_storage(folder, kind, read_only=not create)
        self._lock = functools.partial(study_lock, folder, kind)
        # One optuna study per cell: pruners and samplers compare runs of one kind only.
        self._cells = {}
        for cell in study.cells:
            with damage_as_user_error(self._file):
                optuna_study = open_cell(study, self._storage, f"{study.spec.name} {cell.label}", create)
            if optuna_study is not None:
                self._cells[cell.variant, cell.scale] = optuna_study
        self.plan = {trial.key: trial for trial in plan_trials(study)}

    @classmethod
    def create_or_open(cls, study: Study, *, retry_failed: bool = False) -> StudyStore:
        """Make the study's directory and storage, or open and, where the plan has grown, extend them.

        ``retry_failed`` puts trials whose outcome is failed back into the queue.

        Raises:
            UserError: the directory cannot be written, or holds something else.
        """
        make_folder(study.folder)
        with study_lock(study.folder, study.spec.storage):
            check_against_frozen(study)  # which another process may have written since this one read it
            save_study(study)
            store = cls(study, create=True)
            store.heartbeats.clear_dead()
            store._reclaim()
            for attempt in store._last_attempts() if retry_failed else ():
                if attempt.result is not None and attempt.result.outcome == FAILED:
                    store._enqueue(attempt, 1, attempt.params)
            store._enqueue_missing()
        return store

    @classmethod
    def join(cls, study: Study) -> StudyStore:
        """Open the store of a study that has been made, to work on it. Raises UserError when there is none."""
        _refuse_missing(study)
        with study_lock(study.folder, study.spec.storage):
            store = cls(study, create=True)
            store._enqueue_missing()  # what a process that was killed while it made the study left out
        return store

    def refuse_other_hosts(self) -> None:
        """Raises UserError when a SQLite study is being worked on from another host."""
        if self.study.spec.storage != "sqlite":
            return
        for worker in self.heartbeats.living(self.study.spec.stale_after_s):
            if not worker.is_here:
                raise UserError(
                    f"storage: sqlite is for workers of one host, and {worker.host} works on this study; "
                    "set storage: journal in the study file and choose another --study_dir"
                )

    def claim(self, worker: WorkerId) -> TrialAttempt | None:
        """The next waiting trial, from now on the worker's; None when none waits (others may still be running)."""
        with self._lock():
            self._reclaim(idle=worker)
            for attempt in self._last_attempts():
                if attempt.state == "WAITING" and self._set_state(attempt.trial_id, "RUNNING"):
                    self._write(attempt.trial_id, worker=asdict(worker))
                    if self.study.spec.sampler != "tpe":
                        return attempt
                    hps = suggest_by_tpe(self.study, self._cell(attempt), self._storage, attempt.trial_id)
                    self._write(attempt.trial_id, hps=hps)
                    return replace(attempt, hps=hps)
        return None

    def owns(self, claim: TrialAttempt, worker: WorkerId) -> bool:
        """Whether the trial is still the worker's: one that was silent for too long has lost it."""
        attempt = TrialAttempt.of(self._storage.get_trial(claim.trial_id))
        return attempt.state == "RUNNING" and attempt.worker == worker

    def report(self, claim: TrialAttempt, step: int, loss: float) -> bool:
        """Report the training loss at a step to the pruner; True when it ends the trial."""
        from optuna.trial import Trial

        with self._lock():
            trial = Trial(self._cell(claim), claim.trial_id)
            trial.report(self.study.spec.scores[0].sign * loss, step)
            return bool(trial.should_prune())

    def finish(self, claim: TrialAttempt, result: TrialResult, worker: WorkerId) -> bool:
        """Store the result; False, and nothing is stored, when the trial is no longer the worker's."""
        with self._lock():
            if not self.owns(claim, worker):
                return False
            self._write(claim.trial_id, result=asdict(result))
            self._set_final_state(claim.trial_id, result)
            return True

    def release(self, claim: TrialAttempt, worker: WorkerId, reason: str, *, counts: bool) -> None:
        """Give the trial back to the queue; ``counts``: as an attempt that failed, for ``reason``."""
        with self._lock():
            if self.owns(claim, worker):
                self._mark_lost(claim.trial_id, reason, counts)
                self._enqueue_missing()

    def reclaim_stale(self) -> list[int]:
        """Give the trials of dead workers back to the queue; their numbers."""
        with self._lock():
            return self._reclaim()

    def results(self) -> StudyResults:
        """How every trial stands, from one reading of the storage; writes nothing."""
        attempts = self._last_attempts()
        ended = tuple(attempt.result for attempt in attempts if attempt.result is not None)
        running = tuple(
            RunningTrial(a.number, a.variant, a.scale, a.worker.label if a.worker else "?", a.seconds)
            for a in attempts
            if a.is_running
        )
        return StudyResults(self.study, ended, len(self.plan), running)

    # What follows is called with the lock held, or only reads.

    def _cell(self, trial: PlannedTrial) -> Any:
        """The optuna study of the trial's cell."""
        return self._cells[trial.variant, trial.scale]

    def _attempts(self) -> dict[str, list[TrialAttempt]]:
        """All attempts of every trial of the plan that was ever enqueued, by key, the last one last."""
        attempts = defaultdict(list)
        with damage_as_user_error(self._file):
            for cell in self._cells.values():
                for trial in cell.get_trials(deepcopy=False):
                    if trial.user_attrs.get("key") in self.plan:
                        attempts[trial.user_attrs["key"]].append(TrialAttempt.of(trial))
        return attempts

    def _last_attempts(self) -> list[TrialAttempt]:
        """The last attempt of each enqueued trial, by number."""
        return sorted((attempts[-1] for attempts in self._attempts().values()), key=lambda attempt: attempt.number)

    def _enqueue_missing(self) -> None:
        """Enqueue every trial of the plan that neither waits, runs nor has ended, or fail it after its last attempt."""
        attempts_by_key = self._attempts()
        numbers = {attempts[-1].number for attempts in attempts_by_key.values()}
        for planned in self.plan.values():
            attempts = attempts_by_key.get(planned.key)
            if attempts is None:
                number = planned.number if planned.number not in numbers else max(numbers) + 1
                numbers.add(number)
                self._enqueue(replace(planned, number=number), 1, {})
            elif attempts[-1].is_lost:
                lost = lost_attempts(attempts)
                if lost < self.study.spec.max_attempts:
                    self._enqueue(attempts[-1], lost + 1, attempts[-1].params)
                else:
                    self._fail(attempts[-1], lost)

    def _enqueue(self, trial: PlannedTrial, attempt: int, params: Mapping[str, Any]) -> None:
        """Enqueue an attempt; ``params``: optuna's of an attempt before it, whose point it keeps under tpe."""
        from optuna.trial import TrialState, create_trial

        attributes = trial.attributes(attempt)
        if self.study.spec.sampler == "tpe":
            self._cell(trial).enqueue_trial(dict(params), user_attrs=attributes)
            return
        # Ranges of the numeric dimensions, so that optuna's own tools show the planned points.
        shown = {each.key: each.distribution() for each in self.study.space.dimensions if each.numeric}
        values = {key: trial.hps[key] for key in shown}
        waiting = create_trial(state=TrialState.WAITING, params=values, distributions=shown, user_attrs=attributes)
        self._cell(trial).add_trial(waiting)

    def _fail(self, last: TrialAttempt, attempts: int) -> None:
        """End a trial whose every attempt was lost."""
        from optuna.trial import TrialState, create_trial

        reason = f"lost {attempts} time{'s' if attempts > 1 else ''}, the last time: {last.lost}"
        result = asdict(TrialResult.failed(self.study, vars(last), reason, attempts))
        attributes = last.attributes(last.attempt) | {"result": result}
        self._cell(last).add_trial(create_trial(state=TrialState.FAIL, user_attrs=attributes))

    def _reclaim(self, idle: WorkerId | None = None) -> list[int]:
        """Give the trials of dead workers (and of ``idle``, which says that it runs none) back; their numbers."""
        numbers = []
        for attempt in self._last_attempts():
            if attempt.state == "RUNNING" and attempt.result is not None:  # its worker died before it set the state
                self._set_final_state(attempt.trial_id, attempt.result)
            elif attempt.is_running and self._is_orphaned(attempt, idle):
                self._mark_lost(attempt.trial_id, "its worker died", counts=True)
                numbers.append(attempt.number)
        if numbers:
            self._enqueue_missing()
        return numbers

    def _is_orphaned(self, attempt: TrialAttempt, idle: WorkerId | None) -> bool:
        if attempt.worker is None:
            return attempt.seconds > _UNOWNED_S
        return attempt.worker == idle or self.heartbeats.is_dead(attempt.worker, self.study.spec.stale_after_s)

    def _mark_lost(self, trial_id: int, reason: str, counts: bool) -> None:
        self._write(trial_id, lost=reason, **({} if counts else {"uncounted": True}))
        self._set_state(trial_id, "FAIL")

    def _set_final_state(self, trial_id: int, result: TrialResult) -> None:
        """Set optuna's state: a diverged trial is a complete one with the worst of values, so that TPE learns of it."""
        score = self.study.spec.scores[0]
        value = result.scores.get(score.name) if result.outcome != DIVERGED else None
        state = {PRUNED: "PRUNED", FAILED: "FAIL"}.get(result.outcome, "COMPLETE")
        self._set_state(trial_id, state, score.sign * math.inf if value is None else value)

    def _set_state(self, trial_id: int, state: str, value: float | None = None) -> bool:
        """Set optuna's state, and the value of a complete trial; False for a trial that was claimed meanwhile."""
        from optuna.trial import TrialState

        values = [value] if state == "COMPLETE" else None
        return bool(self._storage.set_trial_state_values(trial_id, TrialState[state], values))

    def _write(self, trial_id: int, **attributes: Any) -> None:
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(trial_id, name, value)


def open_readonly(study: Study) -> StudyStore:
    """The store of a study that exists, for reading alone. Raises UserError when there is none."""
    _refuse_missing(study)
    return StudyStore(study, create=False)


def _refuse_missing(study: Study) -> None:
    if not (study.folder / FILES[study.spec.storage]).is_file():
        raise UserError(
            f"--study_dir: '{study.folder}' holds no study yet; start it with launch/sweep.py run --config STUDY.yaml"
        )


def load_results(source: str | Path) -> StudyResults:
    """The results in the study directory (or of the study) ``source``; only reads. Raises UserError for none."""
    return open_readonly(load_study(source)).results()
