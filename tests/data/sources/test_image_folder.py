"""Image folders: classes, metadata, the split by file name, the check before training, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.data.image_folders import config, metadata, picture
from megadit.config import DataConfig
from megadit.data import build_datasets, check_images, describe
from megadit.data.build import held_out
from megadit.data.dataset import Subset
from megadit.data.sources.image_folder import load as load_folder
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.errors import UserError


def test_one_sub_folder_per_class(tmp_path: Path) -> None:
    picture(tmp_path / "tabby_cat" / "deep" / "1.JPG", 10)
    picture(tmp_path / "tabby_cat" / "2.png", 20)
    picture(tmp_path / "dog" / "1.webp", 30)
    picture(tmp_path / ".hidden" / "1.png")
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("nor this")
    train, val = build_datasets(config(tmp_path, val_fraction=0.0))
    assert train.classes == ("dog", "tabby_cat") and (len(train), len(val)) == (3, 0)
    assert [train.label(i) for i in range(3)] == [0, 1, 1]
    assert [train.caption(i) for i in range(3)] == ["dog", "tabby cat", "tabby cat"]
    assert train.image(1).shape == (3, 4, 4) and int(train.image(1)[0, 0, 0]) == 20
    assert describe(train).image_size == 4 and load_folder(config(tmp_path, image_size=None)).image_size == 256


def test_without_classes_every_image_below_the_folder_counts(tmp_path: Path) -> None:
    for name in ("a.png", "x/b.png", "x/y/c.png"):
        picture(tmp_path / name)
    train, _ = build_datasets(config(tmp_path, condition="none", val_fraction=0.0))
    assert len(train) == 3 and train.classes == () and train.label(0) == 0


def test_metadata_with_captions_and_names_as_labels(tmp_path: Path) -> None:
    for name in ("one.png", "sub/two.png", "three.png"):
        picture(tmp_path / name)
    metadata(
        tmp_path,
        {"file_name": "one.png", "caption": "größte Eins", "label": "b"},
        "",
        {"file_name": "sub/two.png", "label": "a", "extra": [1]},
    )
    train, _ = build_datasets(config(tmp_path, val_fraction=0.0))
    assert len(train) == 2 and train.classes == ("a", "b")  # three.png is not listed
    assert [(train.caption(i), train.label(i)) for i in range(2)] == [("größte Eins", 1), ("", 0)]
    assert train.image(1).shape == (3, 4, 4)


def test_metadata_with_numbers_as_labels_or_none(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        picture(tmp_path / name)
    metadata(tmp_path, {"file_name": "one.png", "label": 3}, {"file_name": "two.png", "label": 1})
    train, _ = build_datasets(config(tmp_path, val_fraction=0.0))
    assert train.classes == ("0", "1", "2", "3") and [train.label(i) for i in range(2)] == [3, 1]
    metadata(tmp_path, {"file_name": "one.png"}, {"file_name": "two.png", "caption": "zwei"})
    train, _ = build_datasets(config(tmp_path, val_fraction=0.0, condition="none"))
    assert train.classes == () and train.caption(1) == "zwei"


def test_the_split_goes_by_file_stem(tmp_path: Path) -> None:
    for i in range(60):
        picture(tmp_path / "a" / f"{i}.png")
        picture(tmp_path / "a" / "larger" / f"{i}.jpg")
        picture(tmp_path / "b" / f"{i}.png")
    train, val = build_datasets(config(tmp_path, val_fraction=0.3))
    assert len(train) + len(val) == 180 and 20 < len(val) < 90
    stems: list[dict[int, set[str]]] = [{part.label(i): set() for i in range(len(part))} for part in (train, val)]
    for split_stems, part in zip(stems, (train, val), strict=True):
        assert isinstance(part, Subset) and isinstance(part.source, FolderSet)
        for i, index in enumerate(part.indices):
            split_stems[part.label(i)].add(part.source.path(index).stem)
    assert all(stems[0][label].isdisjoint(stems[1][label]) for label in (0, 1))
    assert stems[1][0] != stems[1][1]  # another class's picture of the same number is another picture


@pytest.mark.parametrize(
    ("files", "lines", "more", "sentence"),
    [
        ([], None, {}, r"has no images; put them into one sub-folder per class"),
        ([], None, {"condition": "none"}, r"has no images \(\.bmp"),
        (["a.png", "c/b.png"], None, {}, r"has an image, a\.png, outside of any class"),
        (["a.png"], [], {}, r"metadata\.jsonl has no lines"),
        (["a.png"], ["{broken"], {}, r"line 1 of .*metadata\.jsonl is not JSON"),
        (["a.png"], [{"file_name": "a.png", "label": 0}, {"caption": "x"}], {}, r"line 2 of .* has no file_name"),
        (["a.png"], ["[1]"], {}, r"line 1 of .* has no file_name"),
        (["a.png"], [{"file_name": "a.png", "caption": 3}], {}, r"line 1 .*caption must be a string, not 3"),
        (["a.png"], [{"file_name": "a.png", "label": 1.5}], {}, r"label must be a name or a whole number, not 1\.5"),
        (["a.png"], [{"file_name": "a.png", "label": True}], {}, r"label must be a name or a whole number, not true"),
        (
            ["a.png"],
            [{"file_name": "a.png"}],
            {},
            r"1 of 1 lines of .* have no label, line 1 first; .*data\.condition=none",
        ),
        (
            ["a.png"],
            [{"file_name": "a", "label": "x"}, {"file_name": "b", "label": 1}],
            {},
            r"line 1 of .* the name 'x' as label, and line 2 of .* the number 1",
        ),
        (["a.png"], [{"file_name": "a.png", "label": -1}], {}, r"line 1 of .* has the label -1; number classes from 0"),
        (["a.png"], [{"file_name": "a.png", "label": 2**32 - 1}], {}, r"line 1 of .* has the label 4294967295"),
        (["a.png"], [{"file_name": "a.png", "label": None}], {}, r"line 1 of .*label must be .*, not null"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, files: list[str], lines: list[object] | None, more: dict[str, object], sentence: str
) -> None:
    for name in files:
        picture(tmp_path / name)
    if lines is not None:
        metadata(tmp_path, *lines)
    with pytest.raises(UserError, match=rf"^data\.path: .*{sentence}") as caught:
        build_datasets(config(tmp_path, **more))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_paths_and_empty_class_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: not given; image-folder needs"):
        build_datasets(DataConfig(name="image-folder"))
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not a folder"):
        build_datasets(config(tmp_path / "nowhere"))
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*b has no images"):
        build_datasets(config(tmp_path))


def test_a_listed_file_that_is_missing_is_named_when_asked_for(tmp_path: Path) -> None:
    metadata(tmp_path, {"file_name": "gone.png", "label": "x"})
    train, _ = build_datasets(config(tmp_path, val_fraction=0.0))
    with pytest.raises(UserError, match=r"cannot read .*gone\.png"):
        train.image(0)


def test_check_images_counts_and_finds(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / "a" / f"{i:02}.png")
    train, _ = build_datasets(config(tmp_path, val_fraction=0.0))
    result = check_images(train, decode=5)
    assert (result.files, result.opened, result.decoded) == (40, 40, 5)
    assert check_images(train, files=10, decode=4).opened == 10
    assert check_images(train, seconds=0.0).opened == 1  # a look is always taken
    (tmp_path / "a" / "23.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"23\.png is an empty file"):
        check_images(train)


def test_check_images_looks_only_at_its_own_part_and_not_at_memory(tmp_path: Path) -> None:
    for i in range(30):
        picture(tmp_path / "a" / f"{i}.png")
    train, val = build_datasets(config(tmp_path, val_fraction=0.3))
    held = next(i for i in range(30) if held_out("image-folder", f"a/{i}", 0.3))
    (tmp_path / "a" / f"{held}.png").write_bytes(b"junk")
    assert check_images(train).opened == len(train)
    with pytest.raises(UserError, match=rf"{held}\.png"):
        check_images(val)
    digits, _ = build_datasets(DataConfig(name="digits"))
    assert check_images(digits).files == 0
