"""A worker: trials share its process and are the runs that they would be alone; every outcome is a result.

DeepSpeed keeps the groups of a process for good, so each worker here is a forked process of its own.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.studies.tiny_study import TINY, tiny_study
from megadit.config import DataConfig, LoadedConfig, load_config
from megadit.data import build_datasets
from megadit.parallel import start_processes
from megadit.search.storage.identity import this_worker
from megadit.search.storage.store import StudyStore, load_results
from megadit.search.study.spec import WorkersSpec
from megadit.search.workers import worker as worker_module
from megadit.search.workers.pool import DeviceSlot, assign_devices, worker_command, worker_environment
from megadit.search.workers.scores import train_loss
from megadit.search.workers.trial import TrialHooks, run_trial
from megadit.search.workers.worker import NOW, STOP, work

ONE = {"space": {"optim.lr": {"grid": [0.002]}}}
NEVER = TrialHooks(lambda: False, lambda step, loss: False)


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """What every forked process would otherwise import by itself."""
    import optuna  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401

    build_datasets(DataConfig(name="digits"))
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


def forked(action, *args):
    """The result of ``action`` in a process like a worker's."""
    return run_ranks(1, action, *args)[0]


def run_all(study):
    StudyStore.create_or_open(study)
    code = forked(work, study)
    return code, load_results(study.folder).trials


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two cells, one point that diverges and one that the data cannot do, under one worker."""
    folder = tmp_path_factory.mktemp("mixed")
    study = tiny_study(
        folder,
        scale={"key": "model.width", "values": [16, 32]},
        space={"optim.lr": {"grid": [0.002, 1e30]}, "optim.warmup_steps": {"grid": [0, 6]}},
        overrides={"optim.schedule": "cosine"},
        scores=[*TINY["scores"], {"name": "val", "kind": "val_loss"}],
    )
    code, trials = run_all(study)
    return study, code, trials


def test_every_trial_ends_as_what_it_is(mixed):
    study, code, trials = mixed
    assert code == 0 and [trial.number for trial in trials] == list(range(8))
    assert load_results(study.folder).complete
    for trial in trials:
        lr, warmup = trial.hps["optim.lr"], trial.hps["optim.warmup_steps"]
        expected = "failed" if warmup == 6 else "diverged" if lr > 1 else "complete"
        assert trial.outcome == expected, trial
        assert (None not in trial.scores.values()) == (expected == "complete")
        assert trial.attempts == 1
    failed = next(trial for trial in trials if trial.outcome == "failed")
    assert failed.reason.startswith("optim.warmup_steps: 6 leaves nothing of the run's 6 steps")
    diverged = next(trial for trial in trials if trial.outcome == "diverged")
    assert diverged.reason.startswith("the loss at step 2 is ") and diverged.steps < 6


def test_scores_sizes_and_times_are_those_of_the_run(mixed):
    _, _, trials = mixed
    for trial in (trial for trial in trials if trial.outcome == "complete"):
        metrics = rows(trial.run_dir)
        assert trial.scores == {"loss": train_loss(metrics, 6, 3), "val": metrics[-1]["val_loss"]}
        assert (trial.steps, trial.global_batch) == (6, 16)
        assert 0 < trial.overhead_s < trial.seconds
    wide, narrow = trials[0], trials[4]
    assert (wide.scale, narrow.scale) == (32, 16)
    assert wide.parameters > 2 * narrow.parameters and wide.flops > 2 * narrow.flops > 0


def test_a_trial_leaves_a_run_directory_with_what_is_kept_and_no_more(mixed):
    _, _, trials = mixed
    names = {path.name for path in Path(trials[0].run_dir).iterdir()}
    assert {"config.yaml", "mup.json", "metrics.jsonl", "exit.json"} <= names
    assert not names & {"checkpoints", "samples", "tensorboard", "curves.png"}


def run_alone(config, folder):
    from megadit.train.prepare import check_job
    from megadit.train.pretrain import pretrain

    return pretrain(check_job(LoadedConfig(load_config(config)), None, folder, "never"))


def test_a_trial_is_the_run_that_it_would_be_alone(mixed, tmp_path):
    _, _, trials = mixed
    last = [trial for trial in trials if trial.outcome == "complete"][-1]  # after others in its process
    assert forked(run_alone, Path(last.run_dir) / "config.yaml", tmp_path / "alone") == 0
    assert losses(tmp_path / "alone") == losses(last.run_dir)


def test_one_run_scores_every_horizon(tmp_path):
    study = tiny_study(
        tmp_path,
        scale={"key": "train.steps", "values": [4, 6, 8]},
        proxy=None,
        **ONE,
        scores=[*TINY["scores"], {"name": "val", "kind": "val_loss"}],
    )
    assert study.horizons == (4, 6, 8)
    _, (trial,) = run_all(study)
    metrics = rows(trial.run_dir)
    assert trial.horizons.keys() == {4, 6, 8}
    for step, values in trial.horizons.items():
        val = next(row["val_loss"] for row in metrics if row["step"] == step)
        assert values == {"loss": train_loss(metrics, step, 3), "val": val}
    assert trial.scores == trial.horizons[8]
    assert [o.scale for o in load_results(study.folder).observations()] == [4.0, 6.0, 8.0]


def test_a_command_scores_the_checkpoint_which_goes_when_it_is_not_kept(tmp_path):
    program = (
        "import sys, json, pathlib; run = pathlib.Path(sys.argv[1]); "
        "print(json.dumps({'files': len(list((run / 'checkpoints').glob('step-*/index.json')))}))"
    )
    score = {
        "name": "files",
        "kind": "command",
        "key": "files",
        "command": [sys.executable, "-c", program, "{run_dir}"],
    }
    broken = {"name": "broken", "kind": "command", "key": "x", "command": [sys.executable, "-c", "exit('no net')"]}
    (tmp_path / "a").mkdir()
    study = tiny_study(tmp_path / "a", **ONE, scores=[score])
    _, (trial,) = run_all(study)
    assert trial.scores == {"files": 1.0}
    assert not (Path(trial.run_dir) / "checkpoints").exists()
    (tmp_path / "b").mkdir()
    study = tiny_study(tmp_path / "b", **ONE, scores=[broken])
    _, (trial,) = run_all(study)
    assert trial.outcome == "failed" and trial.reason.endswith("ended with exit code 1: no net")


def test_what_the_study_keeps_is_kept(tmp_path):
    study = tiny_study(tmp_path, **ONE, keep=["checkpoint", "samples", "tensorboard", "curves"])
    _, (trial,) = run_all(study)
    names = {path.name for path in Path(trial.run_dir).iterdir()}
    assert {"checkpoints", "samples", "tensorboard", "curves.png"} <= names


def one_trial(study, logs=None):
    """Claim and run a trial; stop it at its ``logs``-th logged step."""
    store, log_numbers = StudyStore.create_or_open(study), iter(range(1, 100))
    hooks = NEVER if logs is None else TrialHooks(lambda: next(log_numbers) >= logs, lambda step, loss: False)
    claim = store.claim(this_worker())
    result = run_trial(study, claim, start_processes(), build_datasets, hooks, time.monotonic())
    if result is None:
        store.release(claim, this_worker(), "interrupted", counts=False)
    return result


def test_an_interrupted_trial_goes_on_from_its_checkpoint(tmp_path):
    study = tiny_study(tmp_path, **ONE, keep=["checkpoint"], overrides={"train.checkpoint_every": 100})
    assert forked(one_trial, study, 4) is None
    folder = study.folder / "trials" / "0000"
    assert json.loads((folder / "exit.json").read_text())["code"] == 85
    before = losses(folder)
    assert len(before) == 4
    result = forked(one_trial, study)
    assert result.outcome == "complete" and result.steps == 6
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert losses(folder)[:4] == before
    (tmp_path / "other").mkdir()
    _, (whole,) = run_all(tiny_study(tmp_path / "other", **ONE))
    assert losses(whole.run_dir) == losses(folder)


def test_without_a_checkpoint_it_starts_clean(tmp_path):
    study = tiny_study(tmp_path, **ONE)
    folder = study.folder / "trials" / "0000"
    assert forked(one_trial, study, 4) is None and len(rows(folder)) == 4
    (folder / "left.txt").write_text("from the killed attempt")
    result = forked(one_trial, study)
    assert result.outcome == "complete" and not (folder / "left.txt").exists()


def test_the_flag_ends_a_worker_at_once_or_after_its_trial(tmp_path):
    study = tiny_study(tmp_path, proxy={"steps": 40})
    StudyStore.create_or_open(study)
    (study.folder / STOP).write_text("after\n")
    assert forked(work, study) == 85
    assert load_results(study.folder).counts["waiting"] == 3
    (study.folder / STOP).write_text(f"{NOW}\n")
    assert forked(work, study) == 85
    (study.folder / STOP).unlink()
    assert forked(work, study) == 0
    assert load_results(study.folder).complete


def test_an_unexpected_error_ends_the_worker_and_gives_its_trial_back(tmp_path, monkeypatch):
    from megadit.search.workers import trial as trial_module

    study = tiny_study(tmp_path, max_attempts=2)
    StudyStore.create_or_open(study)
    monkeypatch.setattr(trial_module, "pretrain", lambda *_, **__: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            forked(work, study)
    monkeypatch.undo()
    assert forked(work, study) == 0
    first, *others = load_results(study.folder).trials
    assert first.outcome == "failed" and "ZeroDivisionError: division by zero" in first.reason
    assert [trial.outcome for trial in others] == ["complete", "complete"]


def test_a_worker_that_lost_its_trial_drops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module.Worker, "_should_stop", lambda self, claim: not self._store.owns(claim, self._id))
    study = tiny_study(tmp_path)
    store = StudyStore.create_or_open(study)
    plain, lost = StudyStore.owns, tmp_path / "lost"

    def owns(self, claim, worker):
        if not lost.exists():  # another worker takes it for dead
            lost.touch()
            self._mark_lost(claim.trial_id, "its worker died", counts=True)
            self._enqueue_missing()
        return plain(self, claim, worker)

    monkeypatch.setattr(StudyStore, "owns", owns)
    assert forked(work, study) == 0
    assert [(t.number, t.outcome, t.attempts) for t in store.results().trials] == [
        (0, "complete", 2), (1, "complete", 1), (2, "complete", 1),
    ]  # fmt: skip


def memory_of_trials(study):
    """(resident bytes, tensors alive) after each trial of the study."""
    import psutil

    store, me, used = StudyStore.create_or_open(study), this_worker(), []
    context, datasets = start_processes(), functools.cache(build_datasets)
    while (claim := store.claim(me)) is not None:
        result = run_trial(study, claim, context, datasets, NEVER, time.monotonic())
        assert result is not None and store.finish(claim, result, me)
        gc.collect()
        used.append((psutil.Process().memory_info().rss, sum(torch.is_tensor(o) for o in gc.get_objects())))
    return used


@pytest.mark.slow
def test_thirty_trials_of_one_process_cost_no_memory(tmp_path):
    study = tiny_study(tmp_path, **ONE, seeds=list(range(15)), scale={"key": "model.width", "values": [16, 64]})
    used = forked(memory_of_trials, study)
    assert len(used) == 30
    # Wide and narrow take turns: like is compared with like.
    assert used[29][0] - used[5][0] < 30e6, [rss >> 20 for rss, _ in used]
    assert used[29][1] <= used[5][1]


def test_places_bind_cores_in_turn_and_gpus_once():
    spec = WorkersSpec(count=2, cores=2, gpus=1)
    assert assign_devices(spec, 2, [0, 1, 2, 3], ["4", "5"]) == [DeviceSlot((0, 1), ("4",)), DeviceSlot((2, 3), ("5",))]
    assert [slot.cores for slot in assign_devices(WorkersSpec(), 3, [6, 7], [])] == [(6,), (7,), (6,)]
    with pytest.raises(Exception, match=r"workers.gpus: 3 workers with 1 each need 3 GPUs, and there are 2 here"):
        assign_devices(spec, 3, [0], ["0", "1"])


def test_the_command_and_environment_of_a_worker():
    env = worker_environment(
        DeviceSlot((0, 1), ()), {"RANK": "3", "SLURM_NTASKS": "8", "PYTHONPATH": "/x", "HOME": "/h"}
    )
    assert (env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"], env["HOME"]) == ("2", "", "/h")
    assert "RANK" not in env and "SLURM_NTASKS" not in env and env["PYTHONPATH"].endswith(f"{os.pathsep}/x")
    assert worker_environment(DeviceSlot((0, 1, 2, 3), ("1", "7")), {})["CUDA_VISIBLE_DEVICES"] == "1,7"
    assert "--nproc_per_node=2" in worker_command(Path("s"), 2)
    assert worker_command(Path("s"), 1)[1:] == ["-m", "megadit.search.workers.worker", "s"]
