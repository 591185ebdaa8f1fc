"""What ``launch/sweep.py run`` does around its workers: one run per study, and an end that no report can spoil."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.owners import killed_owner, leave_owner, parent
from helpers.studies.tiny_study import result_for, tiny_study
from megadit.cli.sweep import main
from megadit.errors import UserError
from megadit.files.owner_file import FILE
from megadit.search.storage.identity import this_worker
from megadit.search.storage.store import StudyStore


def sweep(command: str, folder: Path, *options: str) -> int:
    return main([command, "--config", str(folder / "tiny.yaml"), "--study_dir", str(folder / "study"), *options])


def test_a_second_run_is_refused_and_lifts_no_stop(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    StudyStore.create_or_open(study)
    sweep("stop", tmp_path, "--now")
    owner = leave_owner(study.folder, **parent())
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="add workers to it with launch/sweep.py worker") as refused:
        sweep("run", tmp_path, "--workers", "1")
    assert f"--study_dir: '{study.folder}' is in use by process {owner.pid} on" in str(refused.value)
    assert {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()} == before


def test_a_refused_new_study_leaves_no_folder(tmp_path: Path) -> None:
    tiny_study(tmp_path)
    with pytest.raises(UserError, match="--workers"):
        sweep("run", tmp_path, "--workers", "0")
    assert not (tmp_path / "study").exists()


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch, outcome: str = "complete") -> int:
    """``run`` on a study whose workers have made every trial; its exit code."""
    study = tiny_study(folder)
    store, me = StudyStore.create_or_open(study), this_worker()
    while (claim := store.claim(me)) is not None:
        assert store.finish(claim, result_for(claim, outcome=outcome), me)
    monkeypatch.setattr("megadit.search.workers.pool.WorkerPool.run", lambda *_: None)
    return sweep("run", folder, "--workers", "1")


def test_a_report_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise UserError("--study_dir: cannot write the report (No space left on device)")

    monkeypatch.setattr("megadit.search.report.write_report", full)
    assert finished(tmp_path, monkeypatch) == 0
    output = capsys.readouterr()
    assert "warning: the report failed (UserError: --study_dir: cannot write the report" in output.err
    assert "best       optim.lr=" in output.out


def test_a_failed_trial_stays_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadit.search.report.write_report", lambda folder: (folder, folder))
    assert finished(tmp_path, monkeypatch, "failed") == 1


def test_a_killed_run_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = killed_owner(tmp_path / "study")
    assert json.loads((tmp_path / "study" / FILE).read_text())["pid"] == dead.pid
    monkeypatch.setattr("megadit.search.report.write_report", lambda folder: (folder, folder))
    assert finished(tmp_path, monkeypatch) == 0
    assert f"is taken over from process {dead.pid} on" in capsys.readouterr().err
    assert not (tmp_path / "study" / FILE).exists()
