"""A run writes over nobody's files: its folder is new, or a run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadit.config import load_config, save_config
from megadit.errors import UserError
from megadit.train import entry
from megadit.train.run_dir import RunDirectory, refuse_foreign


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json", "metrics.jsonl", "classes.json", "summary.json"])
def test_a_file_that_a_run_would_replace_stands_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        entry.run("quickstart/digits.yaml", [], None, str(tmp_path), "auto", False)
    assert str(raised.value) == (
        f"--run_dir: '{tmp_path / name}' was not written by a run and would be replaced; choose another folder"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_the_folder_of_the_configuration_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: quickstart/digits.yaml\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^--run_dir: '.*config\.yaml' was not written by a run"):
        entry.run(str(tmp_path / "config.yaml"), [], None, str(tmp_path), "auto", False)


def test_a_run_and_a_folder_with_other_files_are_taken(tmp_path: Path) -> None:
    for name in ("log.txt", "exp.yaml", "exit.json"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    refuse_foreign(tmp_path)
    refuse_foreign(tmp_path / "new")
    save_config(load_config("quickstart/digits.yaml"), tmp_path / "config.yaml")
    (tmp_path / "ds_config.json").write_text("{}", encoding="utf-8")
    refuse_foreign(tmp_path)


def test_a_refusal_is_recorded_in_a_run_and_in_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine", encoding="utf-8")
    RunDirectory(tmp_path).write_refusal("no", 0)
    assert not (tmp_path / "exit.json").exists()
    save_config(load_config("quickstart/digits.yaml"), tmp_path / "config.yaml")
    RunDirectory(tmp_path).write_refusal("no", 0)
    assert (tmp_path / "exit.json").is_file()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/", "checkpoints/step-00000004", "checkpoints/new"])
def test_the_checkpoints_of_a_run_are_no_place_for_another(tmp_path: Path, name: str) -> None:
    """A slip for the run's own folder, as for one of its checkpoints, which --resume names."""
    (tmp_path / "run/checkpoints/step-00000004").mkdir(parents=True)
    refuse_foreign(tmp_path / "run" / name)  # of nobody's run
    save_config(load_config("quickstart/digits.yaml"), tmp_path / "run/config.yaml")
    with pytest.raises(UserError, match=r"^--run_dir: '.*' is among the checkpoints of run '.*/run'; name that run's"):
        refuse_foreign(tmp_path / "run" / name)
    refuse_foreign(tmp_path / "run" / "inner")
