"""A study writes beside nobody's files: a frozen study is known by its header and database, not by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.studies.tiny_study import tiny_study
from megadit.errors import UserError
from megadit.search.storage.store import StudyStore
from megadit.search.study.study import find_study, is_frozen, load_study, save_study


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own study in a file called study.yaml, beside data."""
    tiny_study(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "data.csv").write_text("1\n", encoding="utf-8")
    (tmp_path / "tiny.yaml").rename(folder / "study.yaml")
    return folder / "study.yaml"


def test_a_file_of_that_name_is_an_ordinary_study(mine: Path) -> None:
    before = mine.read_bytes()
    study = load_study(mine)
    assert study.folder == Path("runs/sweeps/study")
    with pytest.raises(
        UserError, match=r"^--study_dir: '.*study\.yaml' was not written by a study and would be replaced"
    ):
        load_study(mine, mine.parent)
    with pytest.raises(UserError, match=r"^study: '.*study\.yaml' was not written by megadit, so that '.*'"):
        load_study(mine.parent)
    assert mine.read_bytes() == before and len(list(mine.parent.iterdir())) == 2


def test_a_frozen_study_goes_on_by_its_file_and_by_its_folder(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    StudyStore.create_or_open(study)
    for source in (study.folder, study.folder / "study.yaml"):
        assert is_frozen(study.folder / "study.yaml") and load_study(source).folder == study.folder


def test_a_copy_of_a_frozen_study_is_a_study_to_make(tmp_path: Path) -> None:
    file = save_study(tiny_study(tmp_path))
    assert find_study(file, None) == (file, None)
    assert find_study(file, tmp_path / "other") == (file, tmp_path / "other")


@pytest.mark.parametrize("name", ["study.db", "journal.log", "trials", "report.html", "workers"])
def test_what_it_would_replace_stands_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^--study_dir: '.*{name}' was not written by a study"):
        tiny_study(tmp_path)
    assert [path.name for path in (tmp_path / "study").iterdir()] == [name]
