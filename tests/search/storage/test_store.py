"""The store of a study: every trial claimed once, given back when its worker dies, kept when the plan grows."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import replace

import pytest

from helpers.studies.tiny_study import result_for, tiny_study
from megadit.errors import UserError
from megadit.search.storage import store as store_module
from megadit.search.storage.identity import WorkerId, this_worker
from megadit.search.storage.store import StudyStore, load_results, open_readonly
from megadit.search.study.study import load_study

KINDS = pytest.mark.parametrize("kind", ["sqlite", "journal"])
ELSEWHERE = WorkerId("other", "another kernel", 12, "345")


def in_process(action, *args):
    """Run in a forked process; returns it. Each process opens the store for itself, as workers do."""
    process = multiprocessing.get_context("fork").Process(target=action, args=args)
    process.start()
    return process


def states(store):
    counts = store.results().counts
    return counts["waiting"], counts["running"], counts["done"]


def take_all(folder, log):
    """What a worker does, without training."""
    store, me = StudyStore.join(load_study(folder)), this_worker()
    with open(log, "a", buffering=1) as file:
        while (claim := store.claim(me)) is not None:
            file.write(f"{claim.number}\n")
            time.sleep(0.1)  # as if training: the others come to the lock meanwhile
            assert store.finish(claim, result_for(claim), me)


@KINDS
def test_concurrent_workers_never_take_a_trial_twice(tmp_path, kind):
    study = tiny_study(tmp_path, storage=kind, seeds=list(range(8)))
    StudyStore.create_or_open(study)
    workers = [in_process(take_all, study.folder, tmp_path / f"log-{index}") for index in range(4)]
    for worker in workers:
        worker.join(90)
        assert worker.exitcode == 0
    claims = Counter(line for log in tmp_path.glob("log-*") for line in log.read_text().split())
    assert claims == Counter(str(number) for number in range(24))
    assert sum(bool(log.read_text()) for log in tmp_path.glob("log-*")) > 1, "one worker took all; nothing was tested"
    results = load_results(study.folder)
    assert results.complete and [trial.number for trial in results.trials] == list(range(24))


def claim_and_die(folder):
    assert StudyStore.join(load_study(folder)).claim(this_worker()) is not None
    os._exit(9)


@KINDS
def test_a_dead_workers_trial_goes_back_and_is_given_up_in_the_end(tmp_path, kind):
    study = tiny_study(tmp_path, storage=kind, space={"optim.lr": {"grid": [0.5]}}, max_attempts=2)
    store = StudyStore.create_or_open(study)
    for attempt in (1, 2):
        process = in_process(claim_and_die, study.folder)
        process.join(60)
        assert states(store) == (0, 1, 0)
        assert store.reclaim_stale() == [0]
        assert states(store) == ((1, 0, 0) if attempt == 1 else (0, 0, 1))
    (trial,) = store.results().trials
    assert (trial.outcome, trial.attempts, trial.hps) == ("failed", 2, {"optim.lr": 0.5})
    assert trial.reason == "lost 2 times, the last time: its worker died"
    assert store.claim(this_worker()) is None
    again = StudyStore.create_or_open(study, retry_failed=True)
    claim = again.claim(this_worker())
    assert (claim.number, claim.attempt) == (0, 1)
    assert again.finish(claim, result_for(claim), this_worker())
    assert again.results().trials[0].outcome == "complete"


def test_a_killed_worker_that_its_parent_has_not_noticed_is_dead(tmp_path):
    study = tiny_study(tmp_path)
    store = StudyStore.create_or_open(study)
    process = in_process(claim_and_die, study.folder)
    end = time.monotonic() + 60
    while store.results().running == () or store.reclaim_stale() == []:  # a zombie until joined
        assert time.monotonic() < end
        time.sleep(0.05)
    process.join()


def test_a_remote_worker_is_judged_by_its_silence(tmp_path):
    study = tiny_study(tmp_path, storage="journal", stale_after_s=60)
    store = StudyStore.create_or_open(study)
    with store.heartbeats.beating(ELSEWHERE, every_s=1000):
        claim = store.claim(ELSEWHERE)
        assert store.reclaim_stale() == [] and store.owns(claim, ELSEWHERE)
        file = study.folder / "workers" / "other-12.alive"
        os.utime(file, (time.time() - 50,) * 2)
        assert store.reclaim_stale() == []
        os.utime(file, (time.time() - 70,) * 2)
        assert store.reclaim_stale() == [claim.number]
    assert not store.owns(claim, ELSEWHERE)
    assert not store.finish(claim, result_for(claim), ELSEWHERE), "its late result must not count"
    assert store.claim(this_worker()).number == claim.number


def test_sqlite_is_for_one_host(tmp_path):
    store = StudyStore.create_or_open(tiny_study(tmp_path))
    with store.heartbeats.beating(this_worker(), every_s=1000):
        store.refuse_other_hosts()
        with (
            store.heartbeats.beating(ELSEWHERE, every_s=1000),
            pytest.raises(UserError, match="storage: sqlite is for workers of one host, and other"),
        ):
            store.refuse_other_hosts()


def test_a_trial_given_back_counts_as_an_attempt_only_when_it_failed(tmp_path):
    store, me = StudyStore.create_or_open(tiny_study(tmp_path, max_attempts=2)), this_worker()
    for counts, attempt in ((False, 1), (False, 1), (True, 2)):
        claim = store.claim(me)
        assert claim.number == 0
        store.release(claim, me, "a reason", counts=counts)
        following = store.claim(me)
        assert (following.number, following.attempt) == (0, attempt)
        store.release(following, me, "interrupted", counts=False)
    store.release(store.claim(me), me, "OutOfMemory", counts=True)
    assert store.results().trials[0].reason == "lost 2 times, the last time: OutOfMemory"


def test_what_died_between_storing_and_telling_has_ended(tmp_path, monkeypatch):
    store, me = StudyStore.create_or_open(tiny_study(tmp_path)), this_worker()
    claim = store.claim(me)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_set_final_state", lambda *_: None)
        store.finish(claim, result_for(claim, 0.25), me)
    assert store.claim(me).number == 1
    assert store.results().trials[0].scores == {"loss": 0.25}


@KINDS
def test_a_grown_plan_keeps_numbers_and_results(tmp_path, kind):
    study = tiny_study(tmp_path, storage=kind)
    store, me = StudyStore.create_or_open(study), this_worker()
    claim = store.claim(me)
    store.finish(claim, result_for(claim, 0.5), me)
    grown = tiny_study(
        tmp_path, storage=kind, seeds=[0, 1], space={"optim.lr": {"grid": [0.0005, 0.001, 0.002, 0.004]}}
    )
    store = StudyStore.create_or_open(grown)
    assert states(store) == (7, 0, 1)
    (trial,) = store.results().trials
    assert (trial.number, trial.hps, trial.scores) == (0, {"optim.lr": 0.001}, {"loss": 0.5})
    numbers = []
    while (claim := store.claim(me)) is not None:
        numbers.append((claim.number, claim.hps["optim.lr"], claim.seed))
        store.finish(claim, result_for(claim), me)
    assert len({number for number, *_ in numbers} | {0}) == 8
    assert (1, 0.002, 0) in numbers and (2, 0.004, 0) in numbers


@KINDS
def test_reading_writes_nothing(tmp_path, kind):
    study = tiny_study(tmp_path, storage=kind)
    store = StudyStore.create_or_open(study)
    claim = store.claim(this_worker())

    def files():
        return {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}

    before = files()
    results = load_results(study.folder)
    assert (results.planned, len(results.running), results.counts["waiting"]) == (3, 1, 2) and not results.complete
    assert open_readonly(study).results().running[0].number == claim.number
    assert files() == before


def test_the_torn_line_of_a_killed_writer_is_dropped(tmp_path):
    study = tiny_study(tmp_path, storage="journal")
    StudyStore.create_or_open(study)
    with open(study.folder / "journal.log", "ab") as file:
        file.write(b'{"op_code":8,"worker_id":"a","trial_id":0,"user_at')
    store, me = StudyStore.join(study), this_worker()
    claim = store.claim(me)
    assert store.finish(claim, result_for(claim), me)
    assert load_results(study.folder).trials[0].number == 0


@KINDS
def test_a_study_that_was_half_made_is_completed_by_who_joins(tmp_path, kind, monkeypatch):
    study = tiny_study(tmp_path, storage=kind)
    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "_enqueue_missing", lambda self: None)  # killed before the trials were queued
        StudyStore.create_or_open(study)
    assert StudyStore.join(study).claim(this_worker()).number == 0


def test_a_directory_without_a_study_is_refused(tmp_path):
    study = tiny_study(tmp_path)
    for opening in (open_readonly, StudyStore.join):
        with pytest.raises(UserError, match="holds no study yet"):
            opening(study)
    study.folder.mkdir()
    (study.folder / "study.db").write_text("no database at all" * 100)
    for opening in (open_readonly, StudyStore.join, StudyStore.create_or_open):
        with pytest.raises(UserError, match="study.db' is not a study's storage"):
            opening(study)


TPE = {
    "sampler": "tpe",
    "trials": 14,
    "seeds": [5, 6],
    "space": {"optim.lr": {"log_uniform": [1e-4, 1]}, "optim.betas": {"choice": [[0.9, 0.9], [0.9, 0.99]]}},
}


def tpe_points(folder):
    """14 trials whose best is lr 0.03; from .3 on they diverge."""
    folder.mkdir()
    store, me, points = StudyStore.create_or_open(tiny_study(folder, **TPE)), this_worker(), []
    while (claim := store.claim(me)) is not None:
        lr = claim.hps["optim.lr"]
        points.append((lr, claim.hps["optim.betas"], claim.seed))
        fine = lr < 0.3
        loss = abs(math.log(lr / 0.03)) if fine else None
        store.finish(claim, result_for(claim, loss, "complete" if fine else "diverged"), me)
    return points


def test_tpe_learns_also_from_diverged_trials(tmp_path):
    points = tpe_points(tmp_path / "a")
    assert len(points) == 14 and [seed for *_, seed in points] == [5, 6] * 7
    assert {tuple(betas) for _, betas, _ in points} == {(0.9, 0.9), (0.9, 0.99)}
    assert any(lr >= 0.3 for lr, *_ in points), "nothing diverged; nothing was tested"
    assert all(lr < 0.3 for lr, *_ in points[10:]), "after ten trials it should know where they diverge"
    assert tpe_points(tmp_path / "b") == points, "the draws are keyed by the trial"


def test_a_tpe_trial_that_is_tried_again_keeps_its_point(tmp_path):
    store, me = StudyStore.create_or_open(tiny_study(tmp_path, **TPE)), this_worker()
    claim = store.claim(me)
    store.release(claim, me, "interrupted", counts=False)
    again = store.claim(me)
    assert replace(again, trial_id=claim.trial_id) == claim


def test_broken_locks_of_the_dead_are_taken_over(tmp_path, monkeypatch):
    from megadit.search.storage import locking

    monkeypatch.setattr(locking, "_BROKEN_AFTER_S", 3)
    study = tiny_study(tmp_path, storage="journal")
    StudyStore.create_or_open(study)
    (study.folder / "study.lock").write_text("")  # left by a holder that was killed
    assert StudyStore.join(study).claim(this_worker()) is not None


def test_a_claim_without_owner_is_lost_after_a_while(tmp_path, monkeypatch):
    from optuna.trial import TrialState

    store = StudyStore.create_or_open(tiny_study(tmp_path))
    first = store._last_attempts()[0]
    store._storage.set_trial_state_values(first.trial_id, TrialState.RUNNING)  # and then its process died
    assert store.reclaim_stale() == []
    monkeypatch.setattr(store_module, "_UNOWNED_S", -1.0)
    assert store.reclaim_stale() == [0]


def test_a_study_that_was_made_meanwhile_is_not_written_over(tmp_path):
    late = tiny_study(tmp_path, seeds=[0])  # it had looked for a study, and found none
    made = tiny_study(tmp_path, seeds=[0], diverged_above=3.0)
    StudyStore.create_or_open(made)
    text = (made.folder / "study.yaml").read_text()
    with pytest.raises(UserError, match="diverged_above"):
        StudyStore.create_or_open(late)
    assert (made.folder / "study.yaml").read_text() == text


def test_a_file_system_that_locks_no_files_is_named(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("megadit.search.storage.locking.fcntl.flock", no_locks)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\); set storage: journal"):
        StudyStore.create_or_open(tiny_study(tmp_path))
