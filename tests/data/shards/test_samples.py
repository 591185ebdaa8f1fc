"""Which members make a sample: as WebDataset groups them, and refused or told where one would be lost."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath

import pytest
import webdataset

from helpers.data.tars import png, samples, write_tar
from megadit.config import DataConfig
from megadit.data.shards.index import load_index, save_index, scan
from megadit.data.shards.naming import KNOWN
from megadit.data.shards.scanning import ScanSummary
from megadit.data.shards.shard_files import ShardFile
from megadit.data.shards.tar_set import TarSet, load_tars
from megadit.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(path: Path, num_classes: int | None = None, **more: object) -> TarSet:
    values = {"name": "webdataset", "path": str(path), "condition": "none", "image_size": 8, **more}
    return load_tars(DataConfig.model_validate(values), num_classes)


def refused(tmp_path: Path, members: object, **more: object) -> str:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError) as caught:
        load(tmp_path, **more)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.path: ")
    return str(caught.value).replace(str(tmp_path / "x.tar"), "x.tar")


A, B = ("a.png", png(1)), ("b.png", png(2))


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([A, A], "the sample a in x.tar has a.png twice; write the tar again with one of them"),
        ([A, ("a.PNG", png())], "has two members of one extension, a.png and a.PNG"),
        ([A, ("./a.png", png())], "has two members of one extension, a.png and ./a.png"),
        ([A, ("a.note", b""), ("a.note", b"")], "the sample a in x.tar has a.note twice"),
        ([A, ("a.jpg", png())], "has two images, a.png and a.jpg; write the tar again with one of them, or name the"),
        ([("d/a.jpg", png()), ("d/a.jpeg", png())], "name the other as a.mask.jpeg, which is not read"),
        ([A, B, A], "x.tar has two samples with the key a: a.png at byte 512, and a.png at byte 2560; give each"),
        ([A, B, ("a.txt", b"")], "x.tar is not sorted: a.txt at byte 2560 lies apart from a.png at byte 512"),
        ([A, B, ("a.note", b""), ("a.txt", b"")], "x.tar is not sorted: a.txt at byte 3072 lies apart from a.png"),
    ],
)
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, members: object, sentence: str) -> None:
    assert sentence in refused(tmp_path, members)


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    names = [
        "./a/b.c/1.PNG",
        "./a/b.c/1.Txt",
        "2.png",
        "2.seg.png",
        "d.e/3.png",
        "plain",
        "._3.png",
        "3.jpeg",
        "4 .png",
    ]
    path = write_tar(tmp_path / "x.tar", [(name, png()) for name in names])
    theirs = {
        str(PurePosixPath(sample["__key__"])): {name for name in sample if name in KNOWN}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert {sample.key: set(sample.spans) for sample in scan(ShardFile.of(path))} == theirs
    assert set(theirs) == {"a/b.c/1", "2", "d.e/3", "3", "4 "}


def test_webdataset_refuses_a_name_that_comes_twice_as_well(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [A, ("a.PNG", png())])
    with pytest.raises(ValueError, match="duplicate file name"):
        list(webdataset.WebDataset(str(path), shardshuffle=False))


def test_an_unsorted_tar_is_read_once_it_is_sorted(tmp_path: Path) -> None:
    """All images, then all texts, as a directory lists them; sorted by name as the remedy, tar --sort=name, does."""
    members = sorted(samples(0, 4).items(), key=lambda item: item[0][-3:])
    assert "write it again with tar --sort=name" in refused(tmp_path, members)
    write_tar(tmp_path / "x.tar", [(f"./{name}", data) for name, data in sorted(members)])
    assert load(tmp_path).index.keys == ("0000", "0001", "0002", "0003")


def test_keys_may_come_again_in_another_tar(tmp_path: Path) -> None:
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, samples(0, 3))
    assert len(load(tmp_path)) == 6


def test_members_that_are_left_out_are_counted_and_named_at_every_start(tmp_path: Path) -> None:
    others = {
        "0.5_cat.jpg": png(),
        "d/.DS_Store": b"",
        "README": b"",
        "e.url": b"",
        "f.url": b"",
        "g.url": b"",
        "h.url": b"",
    }
    write_tar(tmp_path / "x.tar", {**samples(1, 3), **others})
    write_tar(tmp_path / "y.tar", samples(3, 4))
    (tmp_path / "z.tar").write_bytes(bytes(10240))
    for _ in range(2):  # the second is from the cache
        left_out, empty = load(tmp_path).remarks
        assert left_out.startswith(
            "7 of 16 members of the tars are not read: 5 whose extension, all after the first dot"
        )
        assert "(0.5_cat.jpg in x.tar, e.url in x.tar, f.url in x.tar, …)" in left_out
        assert (
            "1 without an extension (README in x.tar); 1 whose name begins with . or __ (d/.DS_Store in x.tar)"
            in left_out
        )
        assert empty == "z.tar has no samples"
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_a_tar_all_of_whose_members_are_left_out_is_refused(tmp_path: Path) -> None:
    members = {f"0.{i}_cat.{kind}": png(i) for i in range(4) for kind in ("jpg", "txt")}
    sentence = refused(tmp_path, members)
    assert "none of the 8 members of x.tar can be read: 8 whose extension, all after the first dot" in sentence
    assert "rename members so that one dot is left, before the extension (0_0_cat.jpg)" in sentence
    assert "give tars of images, and take this one out" in refused(tmp_path, {"a.bmp": b"BM", "README": b""})


def test_samples_without_an_image_are_counted_with_what_they_have(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"{i}.{kind}": b"1" for i in range(3) for kind in ("bmp", "cls")})
    with pytest.raises(
        UserError, match=r"0 in .*has no image .*, nor have 2 others; .*\(not read is 0\.bmp in x\.tar, .*"
    ):
        load(tmp_path)


def test_packed_tars_and_those_in_sub_folders_are_told(tmp_path: Path) -> None:
    below = tmp_path / "part"
    below.mkdir()
    write_tar(below / "y.tar", samples(0, 1))
    (tmp_path / "x-0.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "x-1.tgz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"no \.tar files.*not read \(x-0\.tar\.gz and 1 more in .*not read \(part in "):
        load(tmp_path)
    write_tar(tmp_path / "x.tar", samples(0, 1))
    packed, deeper = load(tmp_path).remarks
    assert packed.startswith("packed tars are not read (x-0.tar.gz and 1 more in")
    assert deeper.startswith("tars in sub-folders are not read (part in")
    assert not load(tmp_path / "x.tar").remarks


def test_side_files_of_macos_are_no_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(0, 1))
    (tmp_path / "._x.tar").write_bytes(b"\0\5\x16\7" + bytes(100))
    tars = load(tmp_path)
    assert len(tars) == 1 and tars.remarks[0].startswith("macOS side files of tars are not read (._x.tar in")


def test_img2dataset_s_layout_is_read(tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        facts = {
            "caption": f"picture {i}" if i else None,
            "url": "u",
            "key": f"{i:09d}",
            "status": "success",
            "width": 8,
        }
        members |= {f"{i:09d}.jpg": png(i), f"{i:09d}.json": json.dumps(facts).encode(), f"{i:09d}.txt": b"text"}
    write_tar(tmp_path / "00000.tar", members)
    tars = load(tmp_path, condition="text")
    assert [tars.caption(i) for i in range(3)] == ["text", "picture 1", "picture 2"] and not tars.remarks


@pytest.mark.parametrize("caption", [5, ["a", "b"], True, {"en": "a"}])
def test_a_caption_that_is_no_text_is_refused(tmp_path: Path, caption: object) -> None:
    facts = json.dumps({"caption": caption}).encode()
    write_tar(tmp_path / "x.tar", {"a.png": png(), "a.json": facts, "a.txt": b"another"})
    with pytest.raises(UserError, match=r"a\.json in .*x\.tar has caption .*, which must be a text"):
        load(tmp_path, condition="text").caption(0)


LABELS: list[tuple[str, bytes, str]] = [
    ("json", b'{"label": null}', "a.json in x.tar: label must be a name or a whole number, not null"),
    ("json", b'{"label": 1.5}', "a.json in x.tar: label must be a name or a whole number, not 1.5"),
    ("json", b'{"label": true}', "not true"),
    ("json", b'{"label": [1]}', "not [1]"),
    ("json", b'{"label": -1}', "a.json in x.tar has the label -1; number classes from 0"),
    ("json", b'{"label": 99999999999999999999}', "beyond 64 bits"),
    ("json", b'{"label": "\\ud800"}', "a.json in x.tar: the label '\\ud800' holds half a surrogate pair"),
    ("json", b'{"label": "a\\u0000b"}', "a.json in x.tar: the label 'a\\x00b' holds a NUL and is no text"),
    ("json", b'{"label": 4294967295}', "a.json in x.tar has the label 4294967295, but model.num_classes is 3"),
    ("cls", b"4294967295\n", "a.cls in x.tar has the label 4294967295, but model.num_classes is 3"),
    ("cls", b"-1", "a.cls in x.tar has the label -1; number classes from 0"),
    ("cls", b" \n", "a.cls in x.tar is empty; a label is one whole number from 0, or a name"),
    ("cls", b"3.0", "a.cls in x.tar is '3.0'; a label is one whole number"),
    ("cls", b"1 2", "a.cls in x.tar is '1 2'; a label is one whole number"),
    ("cls", b"9" * 5000, "a label is one whole number"),
    ("cls", b"caf\xe9", "a.cls in x.tar is not UTF-8 text"),
    ("cls", b"cat", "labels of the tars are names (cat of a in x.tar) and numbers (2 of b in x.tar); use one"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "sentence"), LABELS)
def test_a_label_that_is_none_is_refused_where_labels_are_read(
    tmp_path: Path, kind: str, data: bytes, sentence: str
) -> None:
    members = {"a.png": png(), f"a.{kind}": data, "b.png": png(), "b.cls": b"2"}
    for _ in range(2):  # the second is from the cache
        assert sentence in refused(tmp_path, members, condition="class", num_classes=3)
    assert len(load(tmp_path)) == 2  # condition: none


def test_an_absurd_label_is_refused_where_no_model_is_known(tmp_path: Path) -> None:
    members = {**samples(0, 3), "a.png": png(), "a.cls": b"4294967295"}
    assert "a.cls in x.tar has the label 4294967295, which would make more than" in refused(
        tmp_path, members, condition="class"
    )


def test_labels_that_disagree_are_refused(tmp_path: Path) -> None:
    members = {"a.png": png(), "a.cls": b"1", "a.json": b'{"label": 2}'}
    assert "the label is 1 in a.cls in x.tar and 2 in its json" in refused(tmp_path, members, condition="class")


def test_a_json_that_has_no_label_leaves_it_to_cls(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": b"1", "a.json": b'{"label": null}'})
    assert load(tmp_path, condition="class", num_classes=3).label(0) == 1


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([b"1\n", b" 0 ", b"\xef\xbb\xbf2"], ("0", "1", "2"), [1, 0, 2]),
        ([b"dog", b"cat\n", "猫".encode()], ("cat", "dog", "猫"), [1, 0, 2]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, labels: list[bytes], classes: tuple[str, ...], numbers: list[int]
) -> None:
    members: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.png": png(), f"{i}.cls": label}
    write_tar(tmp_path / "x.tar", members)
    for _ in range(2):
        tars = load(tmp_path, condition="class", num_classes=3)
        assert tars.classes == classes and [tars.label(i) for i in range(3)] == numbers


def test_braces_in_a_name_are_braces(tmp_path: Path) -> None:
    assert "{0}.json in x.tar is" in refused(tmp_path, {"{0}.png": png(), "{0}.json": b"[1]"})


@pytest.mark.parametrize("base", ["null", "[1]", "true", '"\\ud800"', '"a\\u0000b"'])
def test_a_base_name_that_is_none_is_refused(tmp_path: Path, base: str) -> None:
    members = {"a.png": png(), "a.json": b'{"base": %s}' % base.encode()}
    if base == "null":
        write_tar(tmp_path / "x.tar", members)
        assert load(tmp_path).bases == ("a",)
    else:
        assert "a.json in x.tar has base " in refused(tmp_path, members)


def test_a_text_that_is_too_long_for_one_is_refused_before_it_is_read(tmp_path: Path) -> None:
    members = {"a.png": png(), "a.txt": bytes(2**24 + 1)}
    assert "a.txt in x.tar has 16,777,217 bytes, more than a text about one image" in refused(tmp_path, members)


def test_names_of_any_bytes_are_keys_and_come_back_from_the_cache(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9/\x1b[31m../")
    write_tar(tmp_path / "x.tar", {f"{name}{i}.png": png(i) for i in range(2)})
    keys = [load(tmp_path).index.keys for _ in range(2)]
    assert keys[0] == keys[1] == (f"{name}0", f"{name}1")
    tars = load(tmp_path)
    assert tars.listing().detail and tars.where(0, "png").startswith(r"caf\xe9/\x1b[31m../0.png in ")


def test_an_index_that_is_damaged_is_refused(tmp_path: Path) -> None:
    """Of every kind: numbers out of range, parts that do not fit, names of no member."""
    from dataclasses import replace

    from megadit.data.shards.index import build_index

    whole = build_index([scan(ShardFile.of(write_tar(tmp_path / "x.tar", samples(0, 3))))])
    for number, change in enumerate(
        (
            {"shard": whole.shard - 1},
            {"labels": whole.labels[:2]},
            {"sizes": whole.sizes[:, :1]},
            {"offsets": whole.offsets.astype("float32")},
            {"offsets": whole.offsets - 10**6},
            {"members": ("png", "png", "txt")},
            {"members": ("png", "exe", "txt")},
            {"bases": whole.bases[:1]},
            {"classes": ("cat",)},
            {"keys": ()},
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        save_index(replace(whole, **change), path)
        with pytest.raises(UserError, match=r"\.safetensors cannot be read \("):
            load_index(path)
    save_index(replace(whole, summary=ScanSummary(members=9)), path)
    assert load_index(path).summary.members == 9


def test_an_index_without_a_scan_summary_is_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    from megadit.data.shards.index import build_index

    index = build_index([scan(ShardFile.of(write_tar(tmp_path / "x.tar", samples(0, 3))))])
    save_index(index, tmp_path / "i.safetensors")
    with safe_open(tmp_path / "i.safetensors", "numpy") as file:
        parts = set(file.keys())
    assert parts == {"members", "keys", "bases", "classes", "shard", "offsets", "sizes", "labels"}
    assert load_index(tmp_path / "i.safetensors").summary == ScanSummary()
