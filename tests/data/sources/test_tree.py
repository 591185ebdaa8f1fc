"""Folders as people have them: links, folders that cannot be read, files that are no images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.data.image_folders import config, picture
from megadit.data import build_datasets
from megadit.data.dataset import Subset
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.data.sources.image_folder.tree import SkippedFiles, images_below
from megadit.errors import UserError


def names(folder: Path, **more: object) -> tuple[str, ...]:
    train, _ = build_datasets(config(folder, val_fraction=0.0, **more))
    assert isinstance(train, Subset) and isinstance(train.source, FolderSet)
    return train.source.files


def remarks(folder: Path, **more: object) -> str:
    return "\n".join(build_datasets(config(folder, val_fraction=0.0, **more))[0].remarks)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Six images in a, six in b, six in a folder elsewhere to which b has links; and links that lead back."""
    for i in range(6):
        for folder in ("set/a", "set/b", "elsewhere/c"):
            picture(tmp_path / folder / f"{i}.png")
    (tmp_path / "set/b/more").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "set"


@pytest.mark.parametrize("condition", ["class", "none"])
def test_linked_folders_are_followed_in_class_folders_and_in_trees(linked: Path, condition: str) -> None:
    files = names(linked, condition=condition)
    assert len(files) == 18 and files[-1] == "b/more/c/5.png" and files == tuple(sorted(files))
    assert not remarks(linked, condition=condition)


@pytest.mark.parametrize("condition", ["class", "none"])
def test_links_that_lead_back_end_and_are_told(linked: Path, condition: str) -> None:
    (linked / "b/up").symlink_to("..")
    (linked / "b/again").symlink_to("more")
    (linked.parent / "elsewhere/c/out").symlink_to("../..")  # around the set
    files = names(linked, condition=condition)
    assert len(files) == 18
    notes = remarks(linked, condition=condition)
    assert "listed by another path and" in notes and ("in which it lies" in notes or "in which they lie" in notes)


def test_the_own_path_of_a_folder_is_the_one_that_is_listed(tmp_path: Path) -> None:
    picture(tmp_path / "z" / "1.png")
    (tmp_path / "a").symlink_to("z")
    assert names(tmp_path, condition="none") == ("z/1.png",)  # as before links were followed
    (tmp_path / ".kept").mkdir()
    picture(tmp_path / ".kept" / "2.png")
    (tmp_path / "b").symlink_to(".kept")
    assert names(tmp_path, condition="none") == ("b/2.png", "z/1.png")  # a hidden folder is listed by no other path


def test_many_links_to_one_folder_take_no_time(tmp_path: Path) -> None:
    for level in range(40):  # 2^40 paths
        (tmp_path / f"f{level}").mkdir()
        for way in "lr":
            (tmp_path / f"f{level}" / way).symlink_to(f"../f{level + 1}")
    picture(tmp_path / "f40" / "1.png")
    assert images_below(tmp_path, SkippedFiles(tmp_path)) == ["f40/1.png"]


@pytest.mark.parametrize("condition", ["class", "none"])
def test_links_to_folders_around_the_set_are_told_and_not_followed(tmp_path: Path, condition: str) -> None:
    """Else a neighbour's images became a part of the set."""
    picture(tmp_path / "other" / "0.png")
    root = tmp_path / "set"
    picture(root / "a" / "1.png")
    (root / "a" / "up").symlink_to(tmp_path)
    (root / "a" / "top").symlink_to("/")
    assert names(root, condition=condition) == ("a/1.png",)
    notes = f"2 links below {root} lead to folders in which they lie and are not followed (first: a/top)"
    assert notes in remarks(root, condition=condition)


def test_two_classes_that_are_one_folder_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").symlink_to("a")
    assert names(tmp_path) == ("a/1.png", "b/1.png")
    assert f"the classes a and b of {tmp_path} are one folder" in remarks(tmp_path)
    (tmp_path / "c").symlink_to(".")
    with pytest.raises(UserError, match=r"c is a link to a folder in which it lies; remove it"):
        names(tmp_path)


@pytest.mark.parametrize("condition", ["class", "none"])
@pytest.mark.parametrize(("name", "target"), [("2.png", "gone.png"), ("disk", "/nowhere/disk"), ("loop", "loop")])
def test_a_link_that_leads_nowhere_is_refused_where_an_image_may_be_missing(
    tmp_path: Path, condition: str, name: str, target: str
) -> None:
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "a" / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"^data\.path: .*a/{name} is a link to '{target}', which is not there"):
        names(tmp_path, condition=condition)
    (tmp_path / "a" / name).rename(tmp_path / "a" / "notes.txt")
    assert "1 link below" in remarks(tmp_path, condition=condition)


def test_a_class_folder_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").symlink_to("/nowhere/b")
    with pytest.raises(UserError, match="b is a link to '/nowhere/b', which is not there"):
        names(tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "a" / "closed" / "2.png")
    scan = os.scandir

    def refuse(path: str) -> object:  # as for everybody but root
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for condition in ("class", "none"):
        with pytest.raises(UserError, match=r"the folder .*closed cannot be read \(Permission denied\)"):
            names(tmp_path, condition=condition)


def test_what_a_disk_keeps_for_itself_is_not_looked_into(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "lost+found" / "2.png")
    for condition in ("class", "none"):
        assert names(tmp_path, condition=condition) == ("a/1.png",)


def test_a_pipe_in_the_place_of_an_image_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    with pytest.raises(UserError, match=r"2\.png is no regular file"):
        names(tmp_path)


@pytest.mark.parametrize("condition", ["class", "none"])
def test_what_is_left_out_is_counted_and_named(tmp_path: Path, condition: str) -> None:
    picture(tmp_path / "a" / "1.JPG")
    for name in ("2.avif", "3.AVIF", "4.heic", "5", "6.npy", "._1.jpg", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / "a" / "__MACOSX").mkdir()
    assert names(tmp_path, condition=condition) == ("a/1.JPG",)
    notes = remarks(tmp_path, condition=condition)
    assert f"5 files below {tmp_path} are no images that are read here" in notes
    assert "(2 .avif, 1 without an extension, 1 .heic, 1 .npy; first: a/2.avif)" in notes
    assert "2 images and folders below" in notes and "(first: a/._1.jpg)" in notes


def test_what_describes_images_elsewhere_and_is_not_read_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "1.png")
    picture(tmp_path / "test" / "a" / "1.png")
    notes = remarks(tmp_path)
    assert "called test and train, as parts of a set are, and all of them are read; for one alone give" in notes
    assert notes.endswith(f"data.path={tmp_path / 'train'}")
    (tmp_path / "train" / "metadata.jsonl").write_text("{}")
    notes = remarks(tmp_path)
    assert f"{tmp_path}/train/metadata.jsonl is not read" in notes and f"or give data.path={tmp_path}/train" in notes
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert f"{tmp_path}/metadata.csv is not read; labels and captions come from a metadata.jsonl" in remarks(tmp_path)


def test_a_folder_of_tables_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "data-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"has no images .*; it holds 1 \.parquet \(tars are read by data\.name=webda"):
        names(tmp_path, condition="none")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.heic").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"class folder .*a has no images; it holds 1 \.heic; make them \.bmp, .*remove"
    ):
        names(tmp_path)
