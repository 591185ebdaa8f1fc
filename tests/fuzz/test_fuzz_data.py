"""Data sets of other people: tars, folders with metadata, idx files. Every sample is read, or the set is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import strategies as st
from PIL import Image

from helpers.fuzz.hunt import efforts, hunt, json_bytes, mutated, odd_json, odd_values
from megadit.config import DataConfig
from megadit.data.dataset import ImageSet
from megadit.data.shards.naming import Sharding
from megadit.data.shards.tar_set import load_tars
from megadit.data.shards.writing import make_shards
from megadit.data.sources.fashion_mnist import load as load_fashion
from megadit.data.sources.image_folder import load as load_folder
from megadit.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(value: int = 0, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members: Mapping[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def look_at(images: ImageSet, most: int = 6) -> None:
    """What training asks of a set."""
    for i in range(min(len(images), most)):
        assert images.image(i).shape == (images.channels, images.image_size, images.image_size)
        label, caption = images.label(i), images.caption(i)
        assert label >= 0 and isinstance(caption, str)
        images.extras(i)
    listing = images.listing()
    assert len(listing.labels) == len(images)
    for text in images.classes[:100]:
        assert isinstance(text, str)


MEMBERS = {
    "a.png": png(1),
    "a.cls": b"3",
    "a.txt": "a café".encode(),
    "b.json": b'{"caption": "b", "label": "cat", "base": "x"}',
    "b.png": png(2),
    "b.cls": b"cat",
    "sub/c.jpg": png(3),
    "sub/c.json": b'{"caption": "c", "label": 2}',
}
TARS = [
    tar_of({name: data for name, data in MEMBERS.items() if name[0] == "a"}),
    tar_of({name: data for name, data in MEMBERS.items() if name[0] == "b"}, tarfile.GNU_FORMAT),
    tar_of({"é" * 120 + ".png": png(), "x.png": png()}, tarfile.PAX_FORMAT),
    tar_of({"y" * 120 + ".png": png(), "z.png": png(), "z.latent.npy": b"\x93NUMPY"}, tarfile.GNU_FORMAT),
    tar_of({name: data for name, data in MEMBERS.items() if name[0] == "s"}),
]
TAR_WORDS = (
    b"ustar\x0000",
    b"ustar  \0",
    b"0000000",
    b"77777777777\0",
    b"\x80\0\0\0\0\0\0\x7f\xff\xff\xff\xff",
    b"L",
    b"K",
    b"x",
    b"g",
    b"S",
    b"5",
    b"2",
    b"12 size=99999\n",
    b"20 path=../../etc/x\n",
    b"99999999 a=b\n",
    b"0 a=b\n",
    b".pkl",
    b".cls",
    b".json",
    b"18446744073709551616",
    b"-1",
    bytes(512),
    bytes(1024),
)


@efforts
def test_tars_without_a_manifest(effort: str, tmp_path: Path) -> None:
    """Headers, members and joints of tars as others wrote and damaged them."""
    folder = tmp_path / "tars"
    folder.mkdir()

    def read(drawn: tuple[bytes, str]) -> None:
        data, condition = drawn
        (folder / "a.tar").write_bytes(data)
        config = DataConfig.model_validate(
            {"name": "webdataset", "path": str(folder), "image_size": 4, "condition": condition}
        )
        look_at(load_tars(config))

    joined = mutated([*TARS, TARS[0] + TARS[1]], TAR_WORDS)
    hunt(effort, st.tuples(joined, st.sampled_from(["class", "text", "none"])), read, quick=33)


@efforts
def test_labels_and_captions_in_tars(effort: str, tmp_path: Path) -> None:
    """The members are whole; what stands in them is odd."""
    folder = tmp_path / "tars"
    folder.mkdir()
    facts = {"caption": "a", "label": 1, "base": "x", "key": "a"}
    labels = st.one_of(st.none(), mutated([b"3", b"cat", b"4294967295", b"-1"]))
    texts = st.one_of(st.none(), mutated(["a café\n".encode()]))
    drawn = st.tuples(st.one_of(st.none(), odd_json([facts])), labels, texts, st.sampled_from(["class", "text"]))

    def read(values: tuple[bytes | None, bytes | None, bytes | None, str]) -> None:
        *parts, condition = values
        named = dict(zip(("json", "cls", "txt"), parts, strict=True))
        members = {f"a.{kind}": data for kind, data in named.items() if data is not None}
        (folder / "a.tar").write_bytes(tar_of({"a.png": png(), **members, "b.png": png(), "b.cls": b"1"}))
        config = DataConfig.model_validate(
            {"name": "webdataset", "path": str(folder), "image_size": 4, "condition": condition}
        )
        look_at(load_tars(config))

    hunt(effort, drawn, read)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits in two tars, with manifest and index."""
    folder = tmp_path_factory.mktemp("made") / "digits"
    make_shards(DataConfig(name="digits"), folder, Sharding("digits", 900))
    return folder


@efforts
def test_tars_with_a_manifest(effort: str, made: Path, tmp_path: Path) -> None:
    """manifest.json and the index beside our own tars are damaged."""
    folder = tmp_path / "digits"
    shutil.copytree(made, folder)
    manifest = json.loads((made / "manifest.json").read_text())
    index = next(path.name for path in made.iterdir() if path.suffix == ".safetensors")
    whole = {name: (made / name).read_bytes() for name in ("manifest.json", index)}
    drawn = st.one_of(
        st.tuples(st.just("manifest.json"), odd_json([manifest])),
        st.tuples(st.just(index), mutated([whole[index]], most=2)),
    )

    def read(value: tuple[str, bytes]) -> None:
        name, data = value
        (folder / name).write_bytes(data)
        try:
            look_at(load_tars(DataConfig.model_validate({"name": "webdataset", "path": str(folder)})), 3)
        finally:
            (folder / name).write_bytes(whole[name])

    hunt(effort, drawn, read, quick=33)


LINES = [
    {"file_name": "a.png", "caption": "a cat", "label": "cat"},
    {"file_name": "sub/b.png", "text": "a dog", "label": "dog"},
    {"file_name": "a.png", "caption": "x", "label": 3},
    {"file_name": "a.png"},
]


def images_of(path: str, *, labelled: bool) -> DataConfig:
    return DataConfig(name="image-folder", path=path, image_size=4, condition="class" if labelled else "none")


@efforts
def test_metadata_lines(effort: str, tmp_path: Path) -> None:
    """metadata.jsonl of an image folder."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).write_bytes(png())
    whole = b"".join(json_bytes(line) + b"\n" for line in LINES[:2])
    numbered = b"".join(json_bytes({**line, "label": number}) + b"\r\n" for number, line in enumerate(LINES[:2]))
    odd = odd_values([LINES[:2], LINES[2:3], LINES[3:]]).map(
        lambda lines: b"\n".join(map(json_bytes, lines)) if isinstance(lines, list) else json_bytes(lines)
    )

    def read(drawn: tuple[bytes, bool]) -> None:
        data, labelled = drawn
        (tmp_path / "metadata.jsonl").write_bytes(data)
        look_at(load_folder(images_of(str(tmp_path), labelled=labelled)))

    hunt(effort, st.tuples(st.one_of(odd, mutated([whole, numbered])), st.booleans()), read, quick=27)


@efforts
def test_names_of_files(effort: str, tmp_path: Path) -> None:
    """Folders and images may have any name that a file system has."""
    names = st.binary(min_size=1, max_size=30).filter(
        lambda name: not {0, 47} & set(name) and name not in (b".", b"..")
    )
    drawn = st.tuples(st.lists(st.tuples(names, names), min_size=1, max_size=3), st.booleans())
    root = tmp_path / "images"

    def read(value: tuple[list[tuple[bytes, bytes]], bool]) -> None:
        pairs, labelled = value
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for folder, name in pairs:
            class_folder = os.path.join(os.fsencode(root), folder)
            os.makedirs(class_folder, exist_ok=True)
            with open(os.path.join(class_folder, name + b".png"), "wb") as file:
                file.write(png())
        images = load_folder(images_of(str(root), labelled=labelled))
        look_at(images)

    hunt(effort, drawn, read, quick=13)


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values


@efforts
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_files(effort: str, packed: bool, tmp_path: Path) -> None:
    """The four files of Fashion-MNIST, plain or gzipped; those that are read hold two pictures."""
    ending = ".gz" if packed else ""
    pack = gzip.compress if packed else bytes
    whole = {"train-images-idx3-ubyte": idx((2, 4, 4), bytes(range(32))), "train-labels-idx1-ubyte": idx((2,), b"\1\2")}
    files = {name + ending: pack(data) for name, data in whole.items()}
    bomb = [gzip.compress(bytes(2**28))] if packed and effort == "long" else []

    def read(drawn: tuple[str, bytes]) -> None:
        damaged, data = drawn
        for name, sound in files.items():
            (tmp_path / name).write_bytes(data if name == damaged else sound)
        look_at(load_fashion(DataConfig(name="fashion-mnist", path=str(tmp_path))))

    hunt(
        effort,
        st.one_of(*(st.tuples(st.just(name), mutated([data, *bomb])) for name, data in files.items())),
        read,
        quick=13,
    )


def test_the_sound_files_of_these_tests_are_read(made: Path, tmp_path: Path) -> None:
    """Refusals alone would make the tests above empty."""
    for number, data in enumerate(TARS[:3]):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.tar").write_bytes(data)
        config = {"name": "webdataset", "path": str(tmp_path / f"{number}"), "image_size": 4, "condition": "none"}
        look_at(load_tars(DataConfig.model_validate(config)))
    assert len(load_tars(DataConfig.model_validate({"name": "webdataset", "path": str(made)}))) == 1797
    with pytest.raises(UserError, match="data.path"):
        load_folder(images_of(str(tmp_path / "nothing"), labelled=False))
