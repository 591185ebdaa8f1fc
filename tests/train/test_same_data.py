"""A run goes on with the data that it began with: others are refused by name, or accepted and kept on record."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from helpers.models.no_model import ALONE, NoPartitions
from helpers.ranks import run_ranks
from helpers.training import small_config
from megadit.checkpoint.format import Index, Position
from megadit.checkpoint.read import StoredCheckpoint
from megadit.checkpoint.write import save_checkpoint, write_index
from megadit.config import LoadedConfig
from megadit.config import replace as change
from megadit.data import build_datasets
from megadit.errors import UserError
from megadit.train.prepare import TrainingJob, checked_start_point


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for label, name in enumerate(("ant", "cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (8, 8), (label, number, 0)).save(folder / name / f"{number}.png")
    return folder


def of_folder(path, steps=4, **data):
    return small_config(
        model={"in_channels": 3, "num_classes": 3},
        data={"name": "image-folder", "path": str(path), "image_size": 8, "val_fraction": 0.2, **data},
        train={"steps": steps, "global_batch": 4},
        sample={"count": 2, "steps": 2},
    )


def job_of(run_dir, config, resume="auto"):
    return TrainingJob(config, {}, run_dir, resume, *build_datasets(config.data))


def save(job, step, data):
    at = Position(step, 4 * step)
    return save_checkpoint(job.run_dir, NoPartitions(), job.config, at, [], ALONE, extra_state=data.state())


def begun(run_dir, config):
    """A run with a checkpoint of step 2."""
    job = job_of(run_dir, config)
    return save(job, 2, checked_start_point(job, 4).data)


def swap_classes(folder):
    (folder / "cat").rename(folder / "zebra")


def test_the_same_data_go_on_without_a_word(pictures, tmp_path, capsys):
    saved = begun(tmp_path / "run", of_folder(pictures))
    state = json.loads((saved / "state.json").read_text())
    assert state["data"]["classes"] == ["ant", "cat", "dog"] and state["data_changes"] == []
    moved = shutil.move(pictures, tmp_path / "moved")
    start = checked_start_point(job_of(tmp_path / "run", of_folder(tmp_path / "moved"), str(saved)), 4)
    assert moved and (start.checkpoint, start.step, start.data.new) == (saved, 2, ())
    assert capsys.readouterr().err == ""


def test_others_are_refused_by_name_with_the_remedy(pictures, tmp_path):
    saved = begun(tmp_path / "run", of_folder(pictures))
    swap_classes(pictures)
    with pytest.raises(UserError) as refusal:
        checked_start_point(job_of(tmp_path / "run", of_folder(pictures)), 4)
    message = str(refusal.value)
    assert message.startswith(
        f"data.on_change: refuse, and the data are not those of checkpoint {saved}: class 1 was 'cat' "
    )
    assert "(first difference: cat/0.png is gone)" in message
    assert message.endswith("set data.on_change=accept to go on with these") and "\n" not in message
    with pytest.raises(UserError, match="class 1 was 'cat' and is 'dog'"):  # whatever run the checkpoint is of
        checked_start_point(job_of(tmp_path / "other", of_folder(pictures), str(saved)), 4)


def test_a_run_with_nothing_left_to_do_is_not_asked(pictures, tmp_path):
    begun(tmp_path / "run", of_folder(pictures))
    swap_classes(pictures)
    assert checked_start_point(job_of(tmp_path / "run", of_folder(pictures)), 2).step == 2


def test_accepted_changes_are_told_once_and_stay_on_record(pictures, tmp_path, capsys):
    config = of_folder(pictures, on_change="accept")
    begun(tmp_path / "run", config)
    assert capsys.readouterr().err == ""
    swap_classes(pictures)
    job = job_of(tmp_path / "run", config)
    start = checked_start_point(job, 8)
    err = capsys.readouterr().err
    assert err.startswith("note: data.on_change accept: going on with other data: class 1 was 'cat' and is 'dog'")
    save(job, 4, start.data)
    Image.new("RGB", (8, 8)).save(pictures / "ant/8.png")
    later = checked_start_point(job_of(tmp_path / "run", config), 8)  # compared with the newest data alone
    assert "ant/8.png is new" in capsys.readouterr().err
    saved = save(job, 6, later.data)
    history = StoredCheckpoint(saved).state["data_changes"]
    assert [change["step"] for change in history] == [2, 4]
    assert "class 1 was 'cat'" in history[0]["changes"][0] and "ant/8.png" in history[1]["changes"][0]
    strict = checked_start_point(job_of(tmp_path / "run", of_folder(pictures)), 8)
    assert capsys.readouterr().err == "" and len(strict.data.changes) == 2


def test_append_is_no_value_yet(pictures):
    with pytest.raises(ValueError, match="on_change"):
        of_folder(pictures, on_change="append")


def as_before(path, config=None):
    """Take out of a checkpoint what older ones do not have."""
    state = json.loads((path / "state.json").read_text())
    del state["data"], state["data_changes"], state["config"]["data"]["on_change"], state["config"]["data"]["crop"]
    write_index(path, Index.read(path), state)


def test_an_older_checkpoint_goes_on_with_one_note(pictures, tmp_path, capsys):
    saved = begun(tmp_path / "run", of_folder(pictures))
    as_before(saved)
    job = job_of(tmp_path / "run", of_folder(pictures))
    start = checked_start_point(job, 4)
    err = capsys.readouterr().err
    assert err.startswith(f"note: {saved} does not keep what it was trained on") and err.count("\n") == 1
    save(job, 3, start.data)
    assert checked_start_point(job, 4).data.identity == start.data.identity and capsys.readouterr().err == ""


def test_an_older_checkpoint_is_held_against_what_its_run_tells(pictures, tmp_path, capsys):
    saved = begun(tmp_path / "run", of_folder(pictures))
    as_before(saved)
    with pytest.raises(UserError, match="data.flip was false and is true"):
        checked_start_point(job_of(tmp_path / "run", of_folder(pictures, flip=True)), 4)
    (tmp_path / "run/classes.json").write_text(json.dumps(["ant", "cat", "dog"]))
    swap_classes(pictures)
    with pytest.raises(UserError, match="class 1 was 'cat' and is 'dog'"):
        checked_start_point(job_of(tmp_path / "run", of_folder(pictures)), 4)
    assert capsys.readouterr().err.count("note: ") == 2


def test_images_of_before_data_crop_were_cut_by_adm(pictures, tmp_path):
    as_before(begun(tmp_path / "run", of_folder(pictures)))
    assert checked_start_point(job_of(tmp_path / "run", of_folder(pictures)), 4).step == 2
    with pytest.raises(UserError, match=r"data\.crop was adm and is center; give it"):
        checked_start_point(job_of(tmp_path / "run", of_folder(pictures, crop="center")), 4)


def test_of_tars_only_reading_would_tell_and_so_it_is_a_note(pictures, tmp_path, capsys):
    """A new default of a file of ours must not end an old run whose tars hold images of the model's size."""
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        for number, file in enumerate(sorted(pictures.rglob("*.png"))):
            tar.add(file, f"{number}.png")
    keys = {"name": "webdataset", "path": str(tmp_path / "mine.tar"), "condition": "none"}
    config = change(of_folder(pictures), {"model.num_classes": 0, **{f"data.{key}": keys[key] for key in keys}})
    as_before(begun(tmp_path / "run", config))
    for crop, noted in (("adm", False), ("center", True)):
        capsys.readouterr()
        assert checked_start_point(job_of(tmp_path / "run", change(config, {"data.crop": crop})), 4).step == 2
        assert ("note: data.crop: center cuts images of another size" in capsys.readouterr().err) is noted


def _pretrain(config, folder, damaged=None):
    """The whole run in a forked process; (exit code or the refusal)."""
    from megadit.config.deepspeed.merge import merge_ds_config
    from megadit.train.callbacks.artifacts import Checkpoints
    from megadit.train.pretrain import pretrain

    merged = merge_ds_config(LoadedConfig(config), None, 1)
    job = replace(job_of(folder, merged.config), ds_config=merged.ds_config)
    try:
        return pretrain(job, [Checkpoints()], keep_group=True)
    except UserError as error:
        return str(error)


@pytest.mark.distributed
def test_whole_runs(pictures, tmp_path):
    """What is refused before the model is built, what is accepted, and a fallback to a checkpoint of earlier data."""
    run_dir = tmp_path / "run"

    def run(steps, **data):
        config = of_folder(pictures, steps, **data)
        config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 2})})
        return run_ranks(1, _pretrain, config, run_dir)[0]

    assert run(2) == 0
    swap_classes(pictures)
    before = sorted(path for path in run_dir.rglob("*") if path.name != "exit.json")
    assert "class 1 was 'cat' and is 'dog'" in run(4)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 2
    assert sorted(path for path in run_dir.rglob("*") if path.name != "exit.json") == before
    assert run(4, on_change="accept") == 0
    (line,) = map(json.loads, (run_dir / "changes.jsonl").read_text().splitlines())
    assert (line["step"], len(line["data"])) == (2, 2) and "class 1 was 'cat'" in line["data"][0]
    assert StoredCheckpoint(run_dir / "checkpoints/step-00000004").state["data_changes"][0]["step"] == 2
    fragments = next((run_dir / "checkpoints/step-00000004").glob("*.safetensors"))
    content = bytearray(fragments.read_bytes())
    content[-5] ^= 1
    fragments.write_bytes(content)
    assert "step-00000002: class 1 was 'cat'" in run(6)  # the one before it is of the earlier data
    assert run(6, on_change="accept") == 0
