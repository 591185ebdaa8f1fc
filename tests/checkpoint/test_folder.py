"""The folder of checkpoints: which are kept, what a killed save leaves, and which one a job goes on from."""

import json
from types import SimpleNamespace

import pytest

from helpers.models.no_model import ALONE, NoPartitions
from helpers.training import small_config
from megadit.checkpoint import write as module
from megadit.checkpoint.compatibility import check_same_model, describe_changes
from megadit.checkpoint.find import find_checkpoint
from megadit.checkpoint.format import Index, Position
from megadit.checkpoint.names import saved_step
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.write import save_checkpoint, set_latest, write_index
from megadit.errors import UserError
from megadit.train.prepare import find_start_point, total_steps


def save(run_dir, step, **train):
    config = small_config(train=train)
    return save_checkpoint(run_dir, NoPartitions(), config, Position(step, 16 * step), [], ALONE)


def change_state(path, change):
    """Rewrite a checkpoint's state as another program would have written it."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    write_index(path, Index.read(path), state)


def steps_in(run_dir):
    return [int(path.name.removeprefix("step-")) for path in sorted((run_dir / "checkpoints").glob("step-*"))]


def job(run_dir, resume="auto", config=None):
    return SimpleNamespace(run_dir=run_dir, resume=resume, config=config or small_config())


def test_the_last_ones_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep_last=3)
    assert steps_in(tmp_path) == [20, 30, 40]


def test_going_on_from_an_earlier_step_keeps_what_it_saves(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 15)  # resumed from 10; 20 and 30 belong to the abandoned branch
    assert steps_in(tmp_path) == [10, 15]
    assert find_checkpoint(tmp_path).name == "step-00000015"
    save(tmp_path, 15)
    assert StoredCheckpoint(find_checkpoint(tmp_path)).position.step == 15


def test_what_a_killed_save_left_is_taken_away(tmp_path):
    save(tmp_path, 10)
    torn = tmp_path / "checkpoints/.step-00000020.tmp"
    torn.mkdir()
    (torn / "fragments-00000.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "step-00000010"
    save(tmp_path, 25)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000010",
        "step-00000025",
    ]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_index", full)
    with pytest.raises(UserError, match="step-00000020: cannot be written .No space left"):
        save(tmp_path, 20)
    assert find_checkpoint(tmp_path).name == "step-00000010"


def begins_at(job):
    start, _ = find_start_point(job)
    return start.checkpoint, start.step


def test_the_point_of_resumption(tmp_path):
    run_dir, other = tmp_path / "run", tmp_path / "other"
    assert begins_at(job(run_dir)) == (None, 0)
    first, second = save(run_dir, 10), save(run_dir, 20)
    elsewhere = save(other, 5)
    assert begins_at(job(run_dir)) == (second, 20)
    assert find_start_point(job(run_dir))[0].earlier == (first,)
    assert begins_at(job(run_dir, str(first))) == (first, 10)
    assert find_start_point(job(run_dir, str(first)))[0].earlier == ()
    assert begins_at(job(tmp_path / "new", str(other))) == (elsewhere, 5)
    with pytest.raises(UserError, match="--resume: never"):
        find_start_point(job(run_dir, "never"))
    with pytest.raises(UserError, match="of another run, but .* has checkpoints of its own"):
        find_start_point(job(run_dir, str(elsewhere)))
    with pytest.raises(UserError, match=r"train\.seed: 4 differs from 3"):
        find_start_point(job(run_dir, config=small_config(train={"seed": 4})))


def test_a_latest_that_points_nowhere_means_the_newest_complete_one(tmp_path, capsys):
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    pointer = first.parent / "latest"
    pointer.write_text("step-00000099\n")
    assert begins_at(job(tmp_path)) == (second, 20)
    assert "latest: points to 'step-00000099', which is not complete; going on from step-00000020" in stderr_of(capsys)
    pointer.unlink()  # a run directory that was copied without it must not begin anew
    assert begins_at(job(tmp_path)) == (second, 20)
    assert "latest: cannot be read" in stderr_of(capsys)
    with pytest.raises(UserError, match="has checkpoints of its own"):  # which the other's course would drop
        find_start_point(job(tmp_path, str(save(tmp_path / "other", 5))))
    pointer.write_bytes(b"step-\xff\xfe")
    assert begins_at(job(tmp_path)) == (second, 20)
    assert "latest: cannot be read" in stderr_of(capsys) and saved_step(tmp_path) == 0
    set_latest(tmp_path, second)
    assert saved_step(tmp_path) == 20
    pointer.write_text("step-00000010\n")  # killed between the folder's last rename and this
    assert begins_at(job(tmp_path)) == (first, 10)
    assert stderr_of(capsys) == ""


def stderr_of(capsys):
    return capsys.readouterr().err


BREAKS = {
    "no index": lambda path: (path / "index.json").unlink(),
    "torn index": lambda path: (path / "index.json").write_text((path / "index.json").read_text()[:-9]),
    "changed index": lambda path: replace_text(path / "index.json", '"files"', '"filed"'),
    "changed state": lambda path: replace_text(path / "state.json", '"step": 20', '"step": 21'),
    "torn state": lambda path: (path / "state.json").write_text("{"),
    "no state": lambda path: (path / "state.json").unlink(),
}


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_newest_gives_way_unless_it_was_named(tmp_path, capsys, what):
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    BREAKS[what](second)
    assert begins_at(job(tmp_path)) == (first, 10)
    said = stderr_of(capsys)
    assert said.startswith("warning: ") and said.endswith("; going on from step-00000010\n") and said.count("\n") == 1
    with pytest.raises(UserError, match="step-00000020"):
        find_start_point(job(tmp_path, str(second)))
    third = save(tmp_path / "other", 5)
    third.rename(first.with_name(third.name))
    (first / "state.json").unlink()
    assert begins_at(job(tmp_path)) == (first.with_name(third.name), 5)
    assert stderr_of(capsys).count("going on from step-00000005") == 2  # each that is passed over is told
    (first.with_name(third.name) / "state.json").unlink()
    with pytest.raises(UserError, match="no earlier checkpoint of the run is sound"):
        find_start_point(job(tmp_path))


def test_a_newer_format_is_no_broken_checkpoint(tmp_path):
    save(tmp_path, 10)
    index = save(tmp_path, 20) / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "version": 3}))
    with pytest.raises(UserError, match="version 3 is not megadit-checkpoint version 1 to 2"):
        find_start_point(job(tmp_path))


def test_multiples_of_keep_every_stay(tmp_path):
    for step in range(10, 100, 10):
        save(tmp_path, step, keep_last=2, checkpoint_every=10, keep_every=30)
    assert steps_in(tmp_path) == [30, 60, 80, 90]
    save(tmp_path, 50, keep_last=2, checkpoint_every=10, keep_every=30)  # the run was taken back
    assert steps_in(tmp_path) == [30, 50]


@pytest.mark.parametrize("train", [{"keep_every": 30}, {"keep_every": 30, "checkpoint_every": 20}])
def test_keep_every_that_keeps_nothing_is_refused(train):
    with pytest.raises(ValueError, match="keep_every: 30 is no multiple of checkpoint_every"):
        small_config(train=train)


def test_a_checkpoint_older_than_a_key_is_of_the_same_model(tmp_path):
    path = save(tmp_path, 10)
    change_state(path, lambda state: state["config"]["model"].pop("mlp_ratio"))
    stored = StoredCheckpoint(path)
    check_same_model(stored, small_config())
    assert describe_changes(stored.config, small_config().model_dump(mode="json")) == []
    change_state(path, dict.clear)
    with pytest.raises(UserError, match="state.json cannot be read"):
        StoredCheckpoint(path)


def test_the_base_width_of_sp_is_read_by_nothing(tmp_path):
    """A run of before it was refused there goes on without it; under muP it is part of the model."""
    path = save(tmp_path, 10)
    sp, mup = (small_config(model={"parametrization": kind}).model for kind in ("sp", "mup"))
    without = small_config().model_copy(update={"model": sp.model_copy(update={"base_width": None})})
    with pytest.raises(UserError, match=r"model\.base_width \d+ → None"):
        check_same_model(StoredCheckpoint(path), without)
    change_state(path, lambda state: state["config"]["model"].update(sp.model_dump(mode="json")))
    assert mup.base_width is not None and StoredCheckpoint(path).config["model"]["base_width"] == mup.base_width
    check_same_model(StoredCheckpoint(path), without)


def test_another_width_is_refused_with_the_reason(tmp_path):
    path = save(tmp_path, 10)
    with pytest.raises(UserError, match=r"model\.width 32 → 64.*muP transfers hyperparameters, not weights"):
        find_start_point(job(tmp_path, str(path), small_config(model={"width": 64, "heads": 4})))


def test_changed_keys_are_named_and_layout_is_not_one(tmp_path):
    stored = StoredCheckpoint(save(tmp_path, 10))
    assert describe_changes(stored.config, small_config().model_dump(mode="json")) == []
    changed = small_config(optim={"lr": 1e-3}, train={"steps": 20, "micro_batch": 2}, parallel={"zero_stage": 1})
    assert describe_changes(stored.config, changed.model_dump(mode="json")) == [
        "optim.lr 0.004 → 0.001",
        "train.steps 10 → 20",
    ]


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"), [(1.1, 100, 10, 11), (1, 100, 30, 4), (0.001, 100, 10, 1), (3, 100, 100, 3)]
)
def test_epochs_are_rounded_up_to_whole_steps(epochs, images, batch, steps):
    config = small_config(train={"steps": None, "epochs": epochs, "global_batch": batch})
    assert total_steps(config, images) == steps
