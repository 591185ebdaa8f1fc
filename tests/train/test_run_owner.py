"""A run directory has one owner: a second run is refused, a dead one's is taken over, a lost one is left alone."""

import json
import os
import sys
import types

import pytest

from helpers.owners import elsewhere, killed_owner, leave_owner, living_owner
from helpers.ranks import run_ranks
from helpers.training import layout_of, small_config
from megadit.config import save_config
from megadit.files.owner_file import FILE, OwnerFile
from megadit.files.ownership import TIMEOUT


def pretrain_rank(config, folder, patch=None, resume="auto"):
    """A whole run on this rank, with ``patch(folder)`` applied first; its exit code or what it raised."""
    from pathlib import Path

    from megadit.data import build_datasets
    from megadit.train.callbacks.artifacts import Checkpoints
    from megadit.train.callbacks.logging import JsonLines, Wandb
    from megadit.train.prepare import TrainingJob
    from megadit.train.pretrain import pretrain

    if os.environ["RANK"] == "0":
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        sys.stderr = open(Path(folder).parent / "told.txt", "w", buffering=1)  # noqa: SIM115
    if patch is not None:
        patch(Path(folder))
    config, ds_config = layout_of(config, int(os.environ["WORLD_SIZE"]))
    try:
        job = TrainingJob(config, ds_config, Path(folder), resume, *build_datasets(config.data))
        return pretrain(job, [JsonLines(), Checkpoints(), Wandb()])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.distributed
def test_a_second_run_is_refused_and_touches_nothing(tmp_path):
    for name in ("config.yaml", "exit.json", "metrics.jsonl", "checkpoints/.step-00000007.tmp/index.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the first\n")
    with living_owner(tmp_path) as first:
        before = {path: text for path, text in files(tmp_path).items() if path.name != FILE}
        outcome = run_ranks(2, pretrain_rank, small_config(train={"steps": 1}), str(tmp_path))
        assert outcome[0] == outcome[1]
        assert f"--run_dir: '{tmp_path}' is in use by process {first.pid} on {os.uname().nodename}" in outcome[0]
        assert {path: text for path, text in files(tmp_path).items() if path.name != FILE} == before
        assert str(first.pid) in (tmp_path / FILE).read_text()


def test_a_refused_command_leaves_the_record_of_a_living_run(tmp_path):
    from megadit.errors import UserError
    from megadit.train.entry import run
    from megadit.train.run_dir import RunDirectory

    save_config(small_config(), tmp_path / "config.yaml")
    (tmp_path / "exit.json").write_text("{}")
    with living_owner(tmp_path) as first:
        with pytest.raises(UserError, match=f"is in use by process {first.pid} on"):  # before anything is loaded
            run("quickstart/digits.yaml", [], None, str(tmp_path), "auto", False)
        RunDirectory(tmp_path).write_refusal("of some other reason", 3)
    assert (tmp_path / "exit.json").read_text() == "{}"
    (tmp_path / FILE).unlink()
    leave_owner(tmp_path, **elsewhere())
    with pytest.raises(UserError, match="optim.lr"):
        run("quickstart/digits.yaml", ["optim.lr=much"], None, str(tmp_path), "auto", False)
    assert (tmp_path / "exit.json").read_text() == "{}"  # whether that one lives is not known
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match="optim.lr"):
        run("quickstart/digits.yaml", ["optim.lr=much"], None, str(tmp_path), "auto", False)
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 2


@pytest.mark.distributed
def test_a_killed_run_is_taken_over_and_cleaned_up(tmp_path):
    run = tmp_path / "run"
    torn = run / "checkpoints/.step-00000007.0123456789abcdef.tmp"
    torn.mkdir(parents=True)
    dead = killed_owner(run)
    assert run_ranks(1, pretrain_rank, small_config(train={"steps": 1}), str(run)) == [0]
    assert f"is taken over from process {dead.pid} on" in (tmp_path / "told.txt").read_text()
    assert not torn.exists()
    assert not (run / FILE).exists()


def _read_only(folder):
    def fail(*_):
        raise OSError(30, "Read-only file system")

    OwnerFile.create = fail


@pytest.mark.distributed
def test_a_complete_run_needs_no_owner_and_a_longer_one_does(tmp_path):
    run = tmp_path / "run"
    assert run_ranks(1, pretrain_rank, small_config(train={"steps": 1}), str(run)) == [0]
    assert run_ranks(1, pretrain_rank, small_config(train={"steps": 1}), str(run), _read_only) == [0]
    assert "already trained to step 1 of 1" in (tmp_path / "told.txt").read_text(encoding="utf-8")
    outcome = run_ranks(1, pretrain_rank, small_config(train={"steps": 2}), str(run), _read_only)[0]
    assert outcome == f"UserError: --run_dir: '{run}' cannot be written (Read-only file system); choose a writable one"


@pytest.mark.distributed
def test_ranks_wait_in_short_collectives_for_a_silent_owner_whose_files_stay(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv(TIMEOUT, "3")
    leave_owner(run, **elsewhere())
    writing = run / "checkpoints/.step-00000001.0123456789abcdef.tmp"
    writing.mkdir(parents=True)
    config = small_config(train={"steps": 1}, parallel={"timeout_s": 8})
    assert run_ranks(2, pretrain_rank, config, str(run)) == [0, 0]
    outcome = (tmp_path / "told.txt").read_text()
    assert "waiting up to 3 s to see whether process 4242 on gpu07" in outcome
    assert "silent for 3 s" in outcome
    assert writing.is_dir()  # some rank of that owner may still be there
    assert (run / "checkpoints/step-00000001/index.json").is_file()


def _taken_over_at_3(folder):
    """Another host takes the directory over while step 3 is made: this owner had been stopped for a while."""
    from megadit.engine.engine import TrainingEngine

    train_batch = TrainingEngine.train_batch

    def with_loss(engine, step, *rest):
        if step == 2 and engine.context.is_main:
            (folder / FILE).unlink()
            leave_owner(folder, **elsewhere())
            (folder / "checkpoints/.step-00000004.0123456789abcdef.tmp").mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("of the other\n")
        return train_batch(engine, step, *rest)

    TrainingEngine.train_batch = with_loss


@pytest.mark.distributed
def test_a_run_that_lost_its_directory_ends_without_writing(tmp_path):
    config = small_config(train={"steps": 4, "checkpoint_every": 1, "keep_last": 9})
    outcome = run_ranks(2, pretrain_rank, config, str(tmp_path), _taken_over_at_3)
    assert outcome[0] == outcome[1]
    start = f"OwnershipLost: --run_dir: '{tmp_path}' is no longer this process's: process 4242 on gpu07"
    assert outcome[0].startswith(start)
    assert (tmp_path / "metrics.jsonl").read_text() == "of the other\n"
    assert "gpu07" in (tmp_path / FILE).read_text()
    assert not (tmp_path / "exit.json").exists()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [".step-00000004.0123456789abcdef.tmp", "latest", "step-00000001", "step-00000002"]


@pytest.mark.distributed
def test_a_refused_start_leaves_no_new_folder(tmp_path):
    outcome = run_ranks(1, pretrain_rank, small_config(), str(tmp_path / "a/b"), None, str(tmp_path / "none"))[0]
    assert "is no checkpoint" in outcome
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["told.txt"]


class FakeWandb(types.ModuleType):
    """Notes in ``calls.jsonl`` what it is asked."""

    def __init__(self, folder):
        super().__init__("wandb")
        self._calls = folder / "calls.jsonl"

    def init(self, **given):
        with open(self._calls, "a") as file:
            file.write(json.dumps({key: given[key] for key in ("id", "resume")}) + "\n")
        return self

    def log(self, scalars, step):
        assert scalars["train/loss"] > 0

    def finish(self):
        raise RuntimeError("the server is away")


def _with_wandb(folder):
    sys.modules["wandb"] = FakeWandb(folder)


@pytest.mark.distributed
def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path):
    for steps in (1, 2):
        config = small_config(train={"steps": steps, "wandb": True})
        assert run_ranks(1, pretrain_rank, config, str(tmp_path), _with_wandb) == [0]
    first, second = (json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines())
    assert first == second == {"id": json.loads((tmp_path / "wandb.json").read_text())["id"], "resume": "allow"}


def test_the_id_of_a_run_that_began_before_it_was_kept(tmp_path, monkeypatch):
    from megadit.train.run_dir import RunDirectory

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "wandb/run-20260101_120000-a1-b2").mkdir(parents=True)
    (tmp_path / "wandb/latest-run").symlink_to("run-20260101_120000-a1-b2")
    assert RunDirectory(tmp_path).wandb_id() == "a1-b2"
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    assert RunDirectory(tmp_path).wandb_id() == "a1-b2"  # kept
