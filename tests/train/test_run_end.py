"""How a run ends: what is saved, logged and recorded when something fails or a signal comes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from helpers.ranks import run_ranks
from helpers.training import layout_of, small_config


def pretrain_rank(config, folder, patch=None):
    """A whole run on one rank, with ``patch()`` applied first; its exit code or what it raised, and its files."""
    from megadit.data import build_datasets
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    sys.stderr = open(Path(folder).parent / "told.txt", "a", buffering=1)  # noqa: SIM115
    if patch is not None:
        patch()
    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]))
    try:
        code = pretrain(TrainingJob(config, ds_config, Path(folder), "auto", *build_datasets(config.data)))
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    return code


def ends(config, folder, patch=None):
    code = run_ranks(1, pretrain_rank, config, str(folder), patch)[0]
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return code, json.loads((folder / "exit.json").read_text()), rows


def told_by(folder):
    """What the run in ``folder`` printed on stderr."""
    return (folder.parent / "told.txt").read_text()


def latest(folder):
    path = folder / "checkpoints/latest"
    return path.read_text().strip() if path.exists() else None


def _no_pictures():
    from megadit.train import pictures

    def fail(run):
        raise RuntimeError("no memory for pictures")

    pictures.draw_samples = fail


@pytest.mark.distributed
def test_pictures_that_fail_on_the_way_do_not_cost_the_checkpoint(tmp_path):
    config = small_config(train={"steps": 3, "checkpoint_every": 2, "sample_every": 2})
    code, ended, rows = ends(config, tmp_path, _no_pictures)
    assert code == "RuntimeError: no memory for pictures"
    assert (ended["code"], ended["step"]) == (1, 2)
    assert latest(tmp_path) == "step-00000002" and rows[-1]["step"] == 2


def _nothing_works_after_the_save():
    """Pictures, curves, summary, TensorBoard, the workers' end and stdout all fail."""
    from megadit.data import BatchStream
    from megadit.train import pictures, pretrain
    from megadit.train.callbacks import artifacts
    from megadit.train.callbacks.logging import TensorBoard

    def fail(what):
        def failing(*args, **kwargs):
            raise OSError(28, f"no space for {what}")

        return failing

    _no_pictures()
    pictures.draw_curves = fail("curves")
    artifacts.write_json = fail("the summary")
    TensorBoard.close = fail("events")
    BatchStream.close = fail("workers")
    pretrain.stop_processes = fail("groups")
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.distributed
def test_a_run_that_is_saved_ends_well_whatever_fails_after_it(tmp_path):
    run, config = tmp_path / "run", small_config(train={"steps": 3, "tensorboard": True})
    code, ended, rows = ends(config, run, _nothing_works_after_the_save)
    assert (code, ended["code"], ended["reason"], ended["step"]) == (0, 0, "complete", 3)
    assert latest(run) == "step-00000003" and rows[-1]["step"] == 3
    message = told_by(run)
    for what in ("Samples", "drawing curves.png", "summary.json", "closing TensorBoard", "closing the data"):
        assert f"warning: {what} failed (" in message
    assert "Traceback" not in message


def _no_terminal_and_preempted():
    """Whoever read stdout and stderr is gone, and a signal comes; what else follows the save fails too."""
    from megadit.train.callbacks.artifacts import Samples, Summary

    def fail(self, run):
        if run.position.step == 5:
            raise RuntimeError("nothing works")

    _signal_at_5()
    Samples.after_log = Summary.on_end = fail
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, sys.stderr.fileno())


@pytest.mark.distributed
def test_a_preempted_run_is_saved_whatever_fails_beside_it(tmp_path):
    code, ended, _ = ends(small_config(train={"steps": 8}), tmp_path, _no_terminal_and_preempted)
    assert (code, ended["code"], ended["step"], latest(tmp_path)) == (85, 85, 5, "step-00000005")


def _no_exit_record():
    from megadit.train.callbacks.artifacts import Summary
    from megadit.train.run_dir import RunDirectory

    def fail(self, *args):
        raise OSError(28, "No space left on device")

    RunDirectory.write_exit = fail
    Summary.on_end = lambda self, run: None  # what draws is dear


@pytest.mark.distributed
def test_an_exit_record_without_space_is_a_warning(tmp_path):
    run = tmp_path / "run"
    assert run_ranks(1, pretrain_rank, small_config(train={"steps": 1}), str(run), _no_exit_record) == [0]
    assert "warning: exit.json failed" in told_by(run)


def _no_space_at_3():
    """A disk that is full when the metrics of step 3 are written."""
    from megadit.train.callbacks.logging import JsonLines

    def full(self, run, record):
        if record["step"] == 3:
            self._file.close()
            self._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        log(self, run, record)

    log, JsonLines.on_log = JsonLines.on_log, full


@pytest.mark.distributed
def test_metrics_without_space_are_told_in_a_sentence(tmp_path):
    code, ended, _ = ends(small_config(train={"steps": 4, "checkpoint_every": 2}), tmp_path, _no_space_at_3)
    assert code == f"UserError: {tmp_path}: cannot be written (No space left on device); free space or change --run_dir"
    assert (ended["code"], ended["step"]) == (2, 3)
    assert latest(tmp_path) == "step-00000002"


def _signal_at_5():
    from megadit.engine.engine import TrainingEngine

    train_batch = TrainingEngine.train_batch

    def with_signal(engine, step, *rest):
        if step + 1 == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_batch(engine, step, *rest)

    TrainingEngine.train_batch = with_signal


@pytest.mark.distributed
def test_a_preempted_window_is_logged_so_that_no_loss_is_lost(tmp_path):
    config = small_config(train={"steps": 8, "log_every": 4})
    code, ended, rows = ends(config, tmp_path / "a", _signal_at_5)
    assert (code, ended["code"], ended["step"], latest(tmp_path / "a")) == (85, 85, 5, "step-00000005")
    assert [row["step"] for row in rows] == [1, 4, 5]
    code, ended, rows = ends(config, tmp_path / "a")
    assert (code, ended["code"], ended["reason"], ended["step"]) == (0, 0, "complete", 8)
    assert [row["step"] for row in rows] == [1, 4, 5, 8]
    _, _, straight = ends(config, tmp_path / "b")
    assert [row["step"] for row in straight] == [1, 4, 8]
    # the window of steps 5 to 8, in one piece and in two
    assert (rows[2]["loss"] + 3 * rows[3]["loss"]) / 4 == pytest.approx(straight[2]["loss"], rel=1e-12)


def _signal_one_rank_at_5():
    if os.environ["RANK"] == "1":
        _signal_at_5()


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    config = small_config(train={"steps": 30, "log_every": 30})
    assert run_ranks(2, pretrain_rank, config, str(tmp_path), _signal_one_rank_at_5) == [85, 85]
    assert latest(tmp_path) == "step-00000010"


@pytest.mark.distributed
def test_a_preemption_at_a_checkpoint_does_not_save_it_twice(tmp_path):
    config = small_config(train={"steps": 8, "checkpoint_every": 5})
    code, ended, _ = ends(config, tmp_path, _count_saves)
    assert (code, ended["step"]) == (85, 5)
    assert (tmp_path / "saves").read_text() == "5 "


def _count_saves():
    from megadit.train import run as module

    save = module.save_checkpoint

    def counted(run_dir, partitions, config, position, *rest):
        with open(Path(run_dir) / "saves", "a") as file:
            file.write(f"{position.step} ")
        return save(run_dir, partitions, config, position, *rest)

    module.save_checkpoint = counted
    _signal_at_5()
