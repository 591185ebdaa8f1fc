"""Captions beside images and captions that are missing, counted before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.data.image_folders import config, metadata, picture
from helpers.data.tars import png, write_tar
from helpers.training import small_config
from megadit.config import DataConfig
from megadit.data import ImageSet, build_datasets
from megadit.data.conditions import check_text
from megadit.data.shards.encoding import Encoding, encode_set
from megadit.data.shards.naming import Sharding
from megadit.data.shards.writing import make_shards
from megadit.data.verify import check_captions
from megadit.errors import UserError


def folder(tmp_path: Path, texts: dict[str, str | bytes], count: int = 8) -> Path:
    """So many images 0.png, 1.png, ..., in sub-folders of two, and files of captions."""
    for i in range(count):
        picture(tmp_path / f"{i % 2}" / f"{i}.png")
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return tmp_path


def read(path: Path) -> ImageSet:
    return build_datasets(config(path, condition="text", val_fraction=0.0))[0]


def captions(path: Path) -> list[str]:
    images = read(path)
    return [images.caption(i) for i in range(len(images))]


def test_files_of_captions_beside_the_images_are_read_and_told(tmp_path: Path) -> None:
    mark = "\ufeffone cat\r\n".encode("utf-8")
    texts = {"0/0.txt": mark, "0/2.caption": "two", "1/1.png.txt": "größte", "1/3.txt": "3".encode("utf-16")}
    path = folder(tmp_path, {**texts, "0/notes.txt": "of no image", "0/2.txt": " two\n"})
    assert captions(path) == ["one cat", "two", "", "", "größte", "3", "", ""]
    remarks = "\n".join(read(path).remarks)
    assert "read from text files beside the images, 5 in all" in remarks
    assert "no image beside them are left out, 1 in all (first: 0/notes.txt)" in remarks
    other = build_datasets(config(path, condition="none", val_fraction=0.0))[0]
    assert "6 files below" not in str(other.caption(0)) and "5 .txt, 1 .caption" in other.remarks[0]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"0/0.txt": b"a\ncaf\xe9"}, r"0/0\.txt is not a text file \(line 2 has the byte 0xe9, which is not UTF-8\)"),
        ({"0/0.txt": "a", "0/0.caption": "b"}, r"0\.txt and .*0\.caption hold different captions of one image"),
        ({"0/0.txt": "version https://git-lfs.github.com/spec/v1\n"}, "it is a git-LFS pointer"),
    ],
)
def test_files_of_captions_that_cannot_be_used(tmp_path: Path, texts: dict[str, str | bytes], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.path: .*{sentence}"):
        read(folder(tmp_path, texts))


def test_captions_missing_for_seven_of_eight_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    images = read(folder(tmp_path, {"0/0.txt": "a", "0/2.txt": " \n\t"}))
    with pytest.raises(
        UserError, match=r"^data\.condition: text, but 7 of 8 images have no caption \(.*0/2\.png first"
    ) as caught:
        check_captions(0.5, images)
    share = str(caught.value).rpartition("data.max_missing_captions=")[2]
    assert share == "0.875" and "(2.txt)" in str(caught.value)
    check_captions(float(share), images)


def test_some_missing_captions_are_a_warning_once_on_a_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = read(folder(tmp_path, {f"{i % 2}/{i}.txt": f"a {i}" for i in range(6)} | {"0/0.txt": "cut \ufffd"}))
    check_captions(0.5, images)
    err = capsys.readouterr().err
    assert err.startswith("warning: 2 of 8 images have no caption") and "6.png first)" in err
    assert "warning: 1 of 8 captions hold U+FFFD" in err
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_captions(0.5, images)
    assert capsys.readouterr().err == ""


def test_captions_that_are_held_out_are_counted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, {f"{i % 2}/{i}.txt": "cut \ufffd" for i in range(7)})
    parts = build_datasets(config(path, condition="text", val_fraction=0.5))
    assert all(len(part) for part in parts)
    check_captions(0.5, *parts)
    err = capsys.readouterr().err
    assert "1 of 8 images have no caption" in err and "7 of 8 captions hold U+FFFD" in err


def test_the_ending_of_a_file_of_captions_has_any_case(tmp_path: Path) -> None:
    path = folder(tmp_path, {"0/0.TXT": "zero", "1/1.Caption": "one", "0/2.png.TXT": "two"}, count=3)
    assert captions(path) == ["zero", "two", "one"]
    (tmp_path / "0" / "0.txt").write_text("zero")
    (tmp_path / "0" / "0.caption").write_text("another")
    with pytest.raises(UserError, match=r"0/0\.TXT and .*0/0\.caption hold different captions"):
        read(tmp_path)


def test_no_caption_at_all_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    path = folder(tmp_path, {"metadata.csv": "file_name,text\n"})
    with pytest.raises(
        UserError, match=r"no image of image-folder has a caption; .*\(0\.txt\); metadata\.csv is not re"
    ):
        check_captions(1.0, read(path))


def test_metadata_without_captions_says_what_it_has(tmp_path: Path) -> None:
    folder(tmp_path, {})
    metadata(tmp_path, *({"file_name": f"0/{i}.png", "prompt": "x", "caption": "a" * (i == 0)} for i in (0, 2, 4, 6)))
    with pytest.raises(UserError, match=r"3 of 4 images .*\(line 2 of .*0/2\.png first\).*caption or text of .*prompt"):
        check_captions(0.5, read(tmp_path))
    (tmp_path / "0" / "2.txt").write_text("x")
    with pytest.raises(UserError, match=r"metadata\.jsonl alone is read, and not 0/2\.txt"):
        check_captions(0.5, read(tmp_path))


@pytest.mark.parametrize("command", ["make_shards", "encode"])
def test_tars_are_not_written_of_captions_that_are_missing(tmp_path: Path, command: str) -> None:
    path = folder(tmp_path / "set", {"0/0.txt": "a"})
    data, out = config(path, condition="text", val_fraction=0.0), tmp_path / "out"
    with pytest.raises(UserError, match="7 of 8 images have no caption"):
        if command == "make_shards":
            make_shards(data, out, Sharding("x", 4))
        else:
            encode_set(data, out, Sharding("x", 4), Encoding(max_length=8))
    assert not out.exists()


def test_a_run_that_goes_on_is_warned_and_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_config(
        model={"family": "mmdit", "num_classes": 0, "text": {"dim": 384, "max_length": 8}, "input_size": 4},
        objective={"kind": "flow"},
        data={**config(folder(tmp_path, {"0/0.txt": "a"}), condition="text").model_dump(), "text": {"pooled": "none"}},
    )
    images = read(tmp_path)
    with pytest.raises(UserError, match="7 of 8 images have no caption"):
        check_text(run, images)
    check_text(run, images, begun=True)
    assert "warning: 7 of 8 images have no caption" in capsys.readouterr().err


def test_captions_of_tars_are_counted_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    members = {f"{i}.png": png() for i in range(8)}
    members |= {
        "0.json": b'{"text": "read"}',
        "1.txt": "größte".encode("utf-16"),
        "2.json": b'{"caption": "cut \\ud83d"}',
    }
    members |= {"3.txt": b" \n"}
    write_tar(tmp_path / "x.tar", sorted(members.items()))
    data = DataConfig.model_validate(
        {"name": "webdataset", "path": str(tmp_path), "condition": "text", "image_size": 4}
    )
    images = build_datasets(data.model_copy(update={"val_fraction": 0.0}))[0]
    assert [images.caption(i) for i in range(4)] == ["read", "größte", "cut \ufffd", ""]
    with pytest.raises(
        UserError, match=r"5 of 8 images have no caption \(3 in .*x\.tar first\); give captions as \.txt"
    ):
        check_captions(0.5, images)
    check_captions(0.7, images)
    assert "1 of 8 captions hold U+FFFD" in capsys.readouterr().err
