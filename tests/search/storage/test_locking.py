"""The storage of a study opens the file of its own folder, whatever the folder is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megadit.search.storage.locking import FILES, open_storage


@pytest.mark.parametrize(
    "name", ["100% a?b#c%20d;e&mode=memory", 'it\'s "é"\n{SCHEMA_VERSION}\\', os.fsdecode(b"\xff :memory:")]
)
def test_a_folder_of_any_name_has_its_own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from optuna import create_study

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    create_study(storage=open_storage(folder, "sqlite"), study_name="s")
    assert [file.name for file in folder.iterdir()] == [FILES["sqlite"]]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    studies = open_storage(folder, "sqlite", read_only=True).get_all_studies()
    assert [study.study_name for study in studies] == ["s"]
