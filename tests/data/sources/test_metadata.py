"""``metadata.jsonl`` as other programs write it: encodings, line ends, names of files, captions under other keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.data.image_folders import config, metadata, picture
from megadit.data import ImageSet, build_datasets, check_images
from megadit.errors import UserError

INSIDE = "a\u2028b\u0085c\x0bd"  # lines end at none of these


def read(folder: Path, condition: str = "text", num_classes: int | None = None) -> ImageSet:
    return build_datasets(config(folder, condition=condition, val_fraction=0.0), num_classes)[0]


def captions(folder: Path) -> list[str]:
    images = read(folder)
    return [images.caption(i) for i in range(len(images))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone_in_every_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    lines = [json.dumps({"file_name": f"{i}.png", "caption": INSIDE}, ensure_ascii=False) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_bytes(end.join([lines[0], "", lines[1], ""]).encode(encoding))
    assert captions(tmp_path) == [INSIDE, INSIDE]


def test_half_a_surrogate_pair_in_a_caption_becomes_u_fffd(tmp_path: Path) -> None:
    metadata(
        tmp_path,
        '{"file_name": "1.png", "caption": "cut \\ud83d"}',
        '{"file_name": "2", "text": "\\udce9\\ud83d\\ude00"}',
    )
    assert captions(tmp_path) == ["cut \ufffd", "\ufffd😀"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"file_name": "a"}\n\xff{"file_name": "b"}', r"\(line 2 has the byte 0xff, which is not UTF-8\)"),
        (b"[" * 100_000, r"line 1 of .* is not JSON \(is nested too deeply: more than 100 levels\)"),
        (b'{"file_name": "a"}\n' + b'{"a":' * 100_000, r"line 2 of .*is nested too deeply"),
        (b'{"file_name": "a", "label": ' + b"9" * 100_000 + b"}", "has a number of 100000 digits"),
        (b'[\n{"file_name": "a"}\n]', r"line 1 of .* is not JSON .*; if it is one list, write its objects one a line"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "it is a git-LFS pointer"),
        (b'{"image": "a"}', r"line 1 of .* has no file_name, but image: call it file_name"),
        (b'{"file_names": ["a"]}', r"but file_names: call it file_name"),
        (b'{"file_name": "\\ud800.png"}', r"file_name \\ud800\.png holds half a surrogate pair"),
        (b'{"file_name": "a\\u0000.png"}', r"holds a NUL"),
        (b'{"file_name": "/etc/passwd"}', r"file_name /etc/passwd leads out of"),
        (b'{"file_name": "a/../../b.png"}', r"leads out of .*ln -s"),
        (b'{"file_name": "."}', r"names \., which is not there: it is a folder; name a file"),
        (
            b'{"file_name": "a", "caption": "x", "text": "y"}',
            r"line 1 of .* a caption, 'x', and another text, 'y'; keep",
        ),
        (b'{"file_name": "a", "text": ["y"]}', r"line 1 of .*: text must be a string"),
        (b'{"file_name": "a", "caption": ["y"]}', r"line 1 of .*: caption must be a string"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.path: .*{sentence}") as caught:
        check_images(read(tmp_path))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (r"img\\1.png", r"but img/1\.png is: write / for \\ in names"),
        (r"C:\\data\\2.png", r"but 2\.png is: names are relative to data\.path"),
        ("set/2.png", r"but 2\.png is: names are relative to data\.path"),
        ("caf%C3%A9.png", r"but café\.png is: write names as they are, without percent signs"),
        ("cafe\\u0301.png", r"but café\.png is: its accents are composed otherwise"),
        ("2.PNG", r"but 2\.png is: write the name as it is, capitals too"),
        ("2", r"but 2\.png is: write the name as it is, extension too"),
        ("gone/2.jpg", r"nor is the folder .*gone"),
        ("3.jpg", r"copy it there, or take the line out; 2 of 3 files are missing$"),
        ("link.jpg", r"it is a link to 'nowhere', which is not"),
    ],
)
def test_a_file_that_is_missing_is_named_with_its_line_and_what_may_be_meant(
    tmp_path: Path, name: str, remedy: str
) -> None:
    for existing in ("img/1.png", "2.png", "café.png"):
        picture(tmp_path / existing)
    (tmp_path / "link.jpg").symlink_to("nowhere")
    metadata(tmp_path, {"file_name": "2.png"}, f'{{"file_name": "{name}"}}', {"file_name": "gone.png"})
    with pytest.raises(UserError, match=rf"^data\.path: line 2 of .*, which is not there.*{remedy}"):
        check_images(read(tmp_path, "none"))


def test_names_in_the_folder_stay_as_they_are(tmp_path: Path) -> None:
    for existing in ("a..b.png", "sub/c.png"):
        picture(tmp_path / existing)
    metadata(tmp_path, *({"file_name": name} for name in ("a..b.png", "./sub/c.png", "sub/../a..b.png")))
    images = read(tmp_path, "none")
    check_images(images)
    names = [b"a..b.png", b"./sub/c.png", b"sub/../a..b.png"]
    assert list(images.listing().names) == names and -1 not in images.listing().sizes
    metadata(tmp_path, {"file_name": str(tmp_path / "sub" / "c.png")})
    assert list(read(tmp_path, "none").listing().names) == [b"sub/c.png"]


def test_text_is_read_where_there_is_no_caption_and_said_so(tmp_path: Path) -> None:
    lines = [{"file_name": "1", "text": "a"}, {"file_name": "2", "text": "b", "caption": None}]
    metadata(tmp_path, *lines, {"file_name": "3", "caption": "c", "text": "c"})
    assert captions(tmp_path) == ["a", "b", "c"]
    assert "2 of 3 lines of" in read(tmp_path).remarks[0] and "under text, which is read" in read(tmp_path).remarks[0]
    metadata(tmp_path, {"file_name": "1", "text": "a", "caption": "b"})
    assert read(tmp_path, "none").caption(0) == "b"  # which nothing reads


def test_a_file_that_is_named_twice_is_two_images_and_told(tmp_path: Path) -> None:
    metadata(tmp_path, *({"file_name": "1.png", "caption": text} for text in "ab"), {"file_name": "2.png"})
    assert captions(tmp_path) == ["a", "b", ""]
    assert "1 of 3 lines of" in read(tmp_path).remarks[0] and "(line 2, 1.png, first)" in read(tmp_path).remarks[0]


def test_labels_are_held_against_the_model(tmp_path: Path) -> None:
    metadata(tmp_path, {"file_name": "1", "label": 2}, "", {"file_name": "2", "label": 2**32 - 1})
    with pytest.raises(UserError, match=r"line 3 of .*label 4294967295, but model\.num_classes is 10; correct the"):
        read(tmp_path, "class", 10)
    with pytest.raises(UserError, match=r"line 3 of .*label 4294967295, which would make more than 100000 classes"):
        read(tmp_path, "class")
    metadata(tmp_path, {"file_name": "1", "label": 12})
    assert len(read(tmp_path, "class").classes) == 13
    metadata(tmp_path, {"file_name": "1", "category": 12})
    with pytest.raises(UserError, match=r"1 of 1 lines of .* no label, line 1 first \(what else they have: category\)"):
        read(tmp_path, "class")
    assert read(tmp_path, "none").classes == ()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_metadata_that_is_there_and_cannot_be_read_is_not_passed_over(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "a" / "1.png")
    if kind == "link":
        (tmp_path / "metadata.jsonl").symlink_to("gone.jsonl")
    else:
        (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metadata\.jsonl"):
        read(tmp_path, "class")
