"""Where a study's trials are kept: optuna's storage, and the acts on it that several workers may do at once.

A trial of the plan is one or more optuna trials, one per start: a start whose worker died stays as a failed trial, and
a new one with the same planned number waits after it. The last of them says how the trial stands. What optuna has no
place for (number, key, cell, seed, hyperparameters, owner, result) is in the trials' user attributes.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadit.errors import UserError
from megadit.search.results import DIVERGED, FAILED, PRUNED, StudyResults, TrialCounts, TrialResult
from megadit.search.storage.cells import ask_tpe, open_cell, shown_distributions
from megadit.search.storage.identity import Heartbeats, WorkerId
from megadit.search.storage.locking import FILES, damage_as_user_error, open_storage, study_lock
from megadit.search.storage.records import (
    ClaimedTrial,
    StudySnapshot,
    TrialHistory,
    attributes,
    check_start,
    restored,
    stored,
)
from megadit.search.study.plan import PlannedTrial, plan_trials
from megadit.search.study.study import Study, check_against_frozen, load_study, make_folder, save_study

_UNOWNED_S = 60.0  # a running trial without an owner for so long was claimed by a process that died at once


class StudyStore:
    """The trials of one study. Every method that writes holds the study's lock, whoever else works on it."""

    def __init__(self, study: Study, *, create: bool) -> None:
        folder, kind = study.folder, study.spec.storage
        self.study = study
        self.heartbeats = Heartbeats(folder / "workers")
        self._storage = open_storage(folder, kind, read_only=not create)
        self._lock = functools.partial(study_lock, folder, kind)
        # One optuna study per cell: pruners and samplers compare runs of one kind only.
        self._cells = {}
        self._file = folder / FILES[kind]
        for cell in study.cells:
            with damage_as_user_error(self._file):
                found = open_cell(study, self._storage, f"{study.spec.name} {cell.label}", create)
            if found is not None:
                self._cells[cell.variant, cell.scale] = found
        self._plan = {trial.key: trial for trial in plan_trials(study)}

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
            if retry_failed:
                for history in store._histories().values():
                    if history.outcome == FAILED:
                        store._enqueue(history.last.user_attrs, 1, history.last)
            store._fill()
        return store

    @classmethod
    def join(cls, study: Study) -> StudyStore:
        """Open the store of a study that has been made, to work on it. Raises UserError when there is none."""
        _refuse_missing(study)
        with study_lock(study.folder, study.spec.storage):
            store = cls(study, create=True)
            store._fill()  # what a process that was killed while it made the study left out
        return store

    @property
    def planned(self) -> tuple[PlannedTrial, ...]:
        """The plan."""
        return tuple(self._plan.values())

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

    def claim(self, worker: WorkerId) -> ClaimedTrial | None:
        """The next waiting trial, from now on the worker's; None when none waits (others may still be running)."""
        from optuna.trial import TrialState

        with self._lock():
            if self._reclaim(idle=worker):
                self._fill()
            waiting = [history for history in self._histories().values() if history.is_waiting]
            for history in sorted(waiting, key=lambda history: history.number):
                trial, attrs = history.last, history.last.user_attrs
                if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    continue
                self._storage.set_trial_user_attr(trial._trial_id, "worker", worker.to_json())
                hps = attrs["hps"]
                if self.study.spec.sampler == "tpe":
                    hps = ask_tpe(self.study, self._cells[attrs["variant"], attrs["scale"]], self._storage, trial)
                    self._storage.set_trial_user_attr(trial._trial_id, "hps", hps)
                return ClaimedTrial(
                    history.number, attrs["attempt"], attrs["variant"], attrs["scale"], hps, attrs["seed"],
                    trial._trial_id,
                )  # fmt: skip
        return None

    def owns(self, claim: ClaimedTrial, worker: WorkerId) -> bool:
        """Whether the trial is still the worker's: one that was silent for too long has lost it."""
        trial = self._storage.get_trial(claim.trial_id)
        return trial.state.name == "RUNNING" and trial.user_attrs.get("worker") == worker.to_json()

    def report(self, claim: ClaimedTrial, step: int, loss: float) -> bool:
        """Note the training loss at a step; True when the pruner ends the trial."""
        from optuna.trial import Trial

        with self._lock():
            trial = Trial(self._cells[claim.variant, claim.scale], claim.trial_id)
            trial.report(self.study.spec.scores[0].sign * loss, step)
            return bool(trial.should_prune())

    def finish(self, claim: ClaimedTrial, result: TrialResult, worker: WorkerId) -> bool:
        """Store the result; False, and nothing is stored, when the trial is no longer the worker's."""
        with self._lock():
            if not self.owns(claim, worker):
                return False
            self._storage.set_trial_user_attr(claim.trial_id, "result", stored(result))
            self._tell(claim.trial_id, result)
            return True

    def release(self, claim: ClaimedTrial, worker: WorkerId, reason: str, *, counts: bool) -> None:
        """Give the trial back to the queue; ``counts``: as an attempt that failed, for ``reason``."""
        with self._lock():
            if self.owns(claim, worker):
                self._lose(claim.trial_id, reason, counts)
                self._fill()

    def reclaim_stale(self) -> list[int]:
        """Give the trials of dead workers back to the queue; their numbers."""
        with self._lock():
            numbers = self._reclaim()
            if numbers:
                self._fill()
            return numbers

    def snapshot(self) -> StudySnapshot:
        """How every trial stands, from one reading of the storage; writes nothing."""
        histories = sorted(self._histories().values(), key=lambda history: history.number)
        ended = tuple(history.result() for history in histories if history.outcome is not None)
        running = tuple(history.running() for history in histories if history.is_running)
        waiting = len(self._plan) - len(running) - len(ended)  # a trial between two attempts counts as waiting
        return StudySnapshot(StudyResults(self.study, ended, len(self._plan), len(running), waiting), running)

    def counts(self) -> TrialCounts:
        """How many trials stand how; only reads."""
        return self.snapshot().results.counts

    # What follows is called with the lock held, or only reads.

    def _histories(self) -> dict[str, TrialHistory]:
        """All starts of every trial of the plan that was ever queued, by key, the last one last."""
        found: dict[str, TrialHistory] = {}
        for cell in self._cells.values():
            with damage_as_user_error(self._file):
                trials = cell.get_trials(deepcopy=False)
                known = [trial for trial in trials if trial.user_attrs.get("key") in self._plan]
                for trial in known:
                    check_start(trial.user_attrs)
            for trial in known:
                found.setdefault(trial.user_attrs["key"], TrialHistory([])).starts.append(trial)
        return found

    def _fill(self) -> None:
        """Queue every trial of the plan that neither waits, runs nor has ended, or end it after too many attempts."""
        histories = self._histories()
        taken = {history.number for history in histories.values()}
        for planned in self._plan.values():
            history = histories.get(planned.key)
            if history is None:
                number = planned.number if planned.number not in taken else max(taken) + 1
                taken.add(number)
                self._enqueue(attributes(planned, number), 1)
            elif history.is_lost:
                attempts = history.lost_attempts
                if attempts < self.study.spec.max_attempts:
                    self._enqueue(history.last.user_attrs, attempts + 1, history.last)
                else:
                    self._give_up(history, attempts)

    def _enqueue(self, attributes: Mapping[str, Any], attempt: int, before: Any = None) -> None:
        """Queue a start; ``before`` is the one that it follows, whose point it keeps."""
        from optuna.trial import TrialState, create_trial

        own = {key: attributes[key] for key in ("number", "key", "variant", "scale", "hps", "seed")} | {
            "attempt": attempt
        }
        cell = self._cells[own["variant"], own["scale"]]
        if self.study.spec.sampler == "tpe":
            cell.enqueue_trial({} if before is None else before.params, user_attrs=own)
            return
        shown = shown_distributions(self.study)
        trial = create_trial(
            state=TrialState.WAITING,
            params={key: own["hps"][key] for key in shown},
            distributions=shown,
            user_attrs=own,
        )
        cell.add_trial(trial)

    def _give_up(self, history: TrialHistory, attempts: int) -> None:
        """End a trial whose every attempt was lost."""
        from optuna.trial import TrialState, create_trial

        attrs = history.last.user_attrs
        reason = f"lost {attempts} time{'s' if attempts > 1 else ''}, the last time: {attrs['lost']}"
        result = TrialResult.failed(self.study, attrs, reason, attempts)
        own = {key: value for key, value in attrs.items() if key not in ("lost", "uncounted", "worker")}
        ended = create_trial(state=TrialState.FAIL, user_attrs=own | {"result": stored(result)})
        self._cells[attrs["variant"], attrs["scale"]].add_trial(ended)

    def _reclaim(self, idle: WorkerId | None = None) -> list[int]:
        """Mark the running trials of dead workers (and of ``idle``, which says that it runs none) as lost."""
        numbers = []
        for history in self._histories().values():
            trial = history.last
            if trial.state.name != "RUNNING":
                continue
            if "result" in trial.user_attrs:  # its worker died between storing and telling
                self._tell(trial._trial_id, restored(trial.user_attrs["result"]))
                continue
            owner = trial.user_attrs.get("worker")
            if owner is None:
                since = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
                dead = time.time() - since > _UNOWNED_S
            else:
                worker = WorkerId.from_json(owner)
                dead = worker == idle or self.heartbeats.is_dead(worker, self.study.spec.stale_after_s)
            if dead:
                self._lose(trial._trial_id, "its worker died", counts=True)
                numbers.append(history.number)
        return numbers

    def _lose(self, trial_id: int, reason: str, counts: bool) -> None:
        from optuna.trial import TrialState

        self._storage.set_trial_user_attr(trial_id, "lost", reason)
        if not counts:
            self._storage.set_trial_user_attr(trial_id, "uncounted", True)
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _tell(self, trial_id: int, result: TrialResult) -> None:
        """Set optuna's state: a diverged trial is a complete one with the worst of values, so that TPE learns of it."""
        from optuna.trial import TrialState

        score = self.study.spec.scores[0]
        values: Sequence[float] | None = None
        state = {PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}.get(result.outcome, TrialState.COMPLETE)
        if state == TrialState.COMPLETE:
            value = result.scores.get(score.name)
            values = [score.sign * math.inf if value is None or result.outcome == DIVERGED else value]
        self._storage.set_trial_state_values(trial_id, state, values)


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
    return open_readonly(load_study(source)).snapshot().results
