"""What a file is, told by its first bytes: files that real libraries wrote, and what downloads leave behind."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from megadit.checkpoint.names import check_checkpoint_path, run_config
from megadit.config import DataConfig
from megadit.config.deepspeed.file import read_ds_config
from megadit.config.loading.sources import read_yaml
from megadit.convert.torch_files.safe_load import load_file as load_torch
from megadit.data.conditions import load_conditions
from megadit.data.sources import digits as digits_set
from megadit.data.sources.fashion_mnist import read_idx
from megadit.diffusion.sampling.classes import read_classes
from megadit.diffusion.sampling.prompts import read_prompts
from megadit.errors import UserError
from megadit.evaluate.pictures import read_pictures
from megadit.files.file_kind import (
    bytes_instead,
    file_instead,
    instead,
    kind_of,
    kind_of_file,
    other_among,
    refuse_broken,
    text_instead,
)
from megadit.files.json_fields import Fields
from megadit.search.storage.locking import open_storage
from megadit.transfer.score_table import Columns, verify_table


def _torch(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/picture.txt", "x")
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(2))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2))
    return buffer.getvalue()


def _tar(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700000000\n"
FILES: list[tuple[str, Callable[[], bytes]]] = [
    ("git-lfs", lambda: LFS),
    ("git-annex", lambda: b"/annex/objects/SHA256E-s3--ba78.safetensors\n"),
    ("empty", lambda: b""),
    ("zeros", lambda: bytes(2000)),
    ("html", lambda: b"\n<!DOCTYPE html>\n<html><head>"),
    ("html", lambda: b"\xef\xbb\xbf<HTML lang=en>"),
    ("xml", lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    ("json", lambda: json.dumps({"error": "Repository not found"}).encode()),
    ("text", lambda: "Not Found: größer".encode()),
    ("text", lambda: "a".encode("utf-16")),
    ("gzip", lambda: gzip.compress(b"x")),
    ("xz", lambda: lzma.compress(b"x")),
    ("bzip2", lambda: bz2.compress(b"x")),
    ("torch", lambda: _torch(legacy=False)),
    ("old-torch", lambda: _torch(legacy=True)),
    ("pickle", lambda: pickle.dumps({"model": [1]})),
    ("safetensors", lambda: save({"weight": torch.zeros(2)})),
    ("npz", _npz),
    ("npy", _npy),
    ("zip", _zip),
    ("tar", lambda: _tar(tarfile.PAX_FORMAT)),
    ("tar", lambda: _tar(tarfile.GNU_FORMAT)),
    *[(kind, lambda kind=kind: _picture(kind.upper())) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "make"), FILES, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(FILES)])
def test_the_kind_of_a_file(kind: str, make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(make())
    file_kind = kind_of_file(path)
    assert file_kind is not None and file_kind.id == kind
    assert file_instead(path, kind) is None
    sentence = file_instead(path, "another")
    assert sentence is not None and sentence.startswith(f"it is {file_kind.name}; ")


def test_a_database(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "study.db")
    connection.execute("create table t (x)")
    connection.commit()
    connection.close()
    file_kind = kind_of_file(tmp_path / "study.db")
    assert file_kind is not None and file_kind.id == "sqlite"


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\x03" * 400, b"\x01\xfe\x00\x80", b"\x00" * 10 + b"\x01"], ids=["counting", "noise", "one"]
)
def test_what_is_not_known_is_not_guessed(data: bytes) -> None:
    assert kind_of(data) is None
    assert instead(kind_of(data), "tar") is None


def test_a_letter_that_the_end_of_the_look_cuts_is_still_text() -> None:
    file_kind = kind_of(("a" * 4095 + "é").encode()[:4096], 5000)
    assert file_kind is not None and file_kind.id == "text"


@pytest.mark.parametrize("kind", ["torch", "npz", "png", "jpeg", "safetensors"])
def test_a_file_that_is_cut_off(kind: str, tmp_path: Path) -> None:
    data = next(make for name, make in FILES if name == kind)()
    path = tmp_path / "file"
    path.write_bytes(data[: 40 if kind == "safetensors" else len(data) - 30])
    sentence = file_instead(path, kind)
    assert sentence is not None and sentence.startswith("it is cut off: ")
    assert bytes_instead(path.read_bytes(), kind) == sentence
    if kind in ("torch", "safetensors"):  # weights, which are read long after the folder was looked at
        with pytest.raises(UserError, match="data.vae.path: '.*' cannot be read: it is cut off"):
            refuse_broken("data.vae.path", [path])


@pytest.mark.parametrize(
    "text", ["BMW on a road", "BZh1 is a mark", "MZ and more than enough words", "<b>bold</b> words"]
)
def test_a_text_that_begins_like_another_file_is_a_text(text: str) -> None:
    file_kind = kind_of(text.encode())
    assert file_kind is not None and file_kind.id == "text"
    assert text_instead(text.encode()) is None


def test_pointers_and_pages_are_no_texts() -> None:
    assert "git lfs pull" in str(text_instead(LFS))
    assert "web page" in str(text_instead(b"<!DOCTYPE html>"))


def test_tensors_that_are_cut_off(tmp_path: Path) -> None:
    data = save({"weight": torch.zeros(100)})
    assert bytes_instead(data, "safetensors") is None
    assert "its tensors need" in str(bytes_instead(data[:-8], "safetensors"))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("model.safetensors", LFS, "run `git lfs pull`"),
        ("model.safetensors", _torch(legacy=False), "it is a torch file"),
        ("pytorch_model.bin", b"<html>", "web page"),
        ("config.json", b"", "it is an empty file"),
        ("vocab.txt", LFS, "run `git lfs pull`"),
        ("spiece.model", b"<!doctype html>", "web page"),
    ],
)
def test_files_are_held_to_their_endings(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    good = {
        "model.safetensors": save({}),
        "config.json": b"{}",
        "vocab.txt": b"[PAD]\nhtml\n",
        "spiece.model": b"\x0a\x0e",
    }
    good["pytorch_model.bin"] = _torch(legacy=True)
    (tmp_path / name).write_bytes(good[name])
    assert other_among([tmp_path / name, tmp_path / "gone.json", tmp_path / "README.md"]) is None
    refuse_broken("data.text.path", [tmp_path / name, tmp_path / "gone.json"])
    (tmp_path / name).write_bytes(data)
    message = other_among([tmp_path / name])
    assert (
        message is not None
        and message.startswith(f"'{tmp_path / name}' is not what its name says: ")
        and sentence in message
    )


# What reads a text or JSON file that a user names, and the option in its message.
TEXT_READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "configuration": (read_yaml, "config: "),
    "ds_config": (read_ds_config, "--ds_config: "),
    "prompts": (read_prompts, "--prompts: "),
    "json": (lambda path: Fields.of_file(path, "IN"), "IN: "),
    "table": (lambda path: verify_table(path, Columns("scale", "hp", "score"), lower=True), "--table: "),
    "classes": (lambda path: read_classes(path.parent), ""),
}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (LFS, "it is a git-LFS pointer; run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>\n<body>\nSign in\n</body>\n", r"it is a web page \(HTML\); fetch the file itself"),
        (_torch(legacy=False), "it is a torch file"),
        (gzip.compress(b"a: 1"), "it is compressed by gzip; unpack it first"),
    ],
    ids=["pointer", "page", "torch", "gzip"],
)
@pytest.mark.parametrize("reader", TEXT_READERS)
def test_a_text_that_is_something_else_is_never_read(reader: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    read, option = TEXT_READERS[reader]
    path = tmp_path / ("classes.json" if reader == "classes" else "x.json" if reader == "ds_config" else "x.yaml")
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{option}.*{path.name}.*{sentence}"):
        read(path)


def _as(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """``read`` on a file of that name that holds the given bytes."""

    def run(folder: Path, data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return run


# What reads a file of bytes: by the name it looks for, and the words before what the file is.
BINARY_READERS: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "idx": (_as("images-idx3-ubyte", lambda path: read_idx(path, 3)), "data.path: .* is not an idx file .*; "),
    "idx.gz": (_as("images.gz", lambda path: read_idx(path, 3)), "data.path: .* is no gzip file: "),
    "npz": (_as("x.npz", read_pictures), "x.npz: is no npz file: "),
    "null text": (_as("null_text.safetensors", load_conditions), "null_text.safetensors' cannot be read: "),
    "study": (_as("study.db", lambda path: open_storage(path.parent, "sqlite")), "is not a study's storage: "),
    "init_from": (_as("x.pt", lambda path: check_checkpoint_path(str(path), "train.init_from")), "init_from: .*: "),
    "run": (_as("run", run_config), "run' is no run directory .*: "),
    "torch": (_as("x.pt", load_torch), "x.pt: cannot be read as a torch file: "),
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (LFS, "it is a git-LFS pointer; run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", r"it is a web page \(HTML\); fetch the file itself"),
        (_npy(), r"it is a NumPy array \(.npy\)"),
    ],
    ids=["pointer", "page", "npy"],
)
@pytest.mark.parametrize("reader", BINARY_READERS)
def test_a_file_that_is_something_else_is_named(reader: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    read, words = BINARY_READERS[reader]
    with pytest.raises(UserError, match=words + sentence):
        read(tmp_path, data)


def test_packages_whose_files_are_damaged_are_to_be_installed_again(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "digits.csv.gz").write_bytes(LFS)
    monkeypatch.setattr(digits_set, "find_table", lambda: tmp_path / "digits.csv.gz")
    with pytest.raises(UserError, match="data.name: digits: .*it is a git-LFS pointer; .*install scikit-learn again"):
        digits_set.load(DataConfig(name="digits"))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["model_index.json"],
            "it is a folder of diffusers; .* --from diffusers",
        ),
        (
            ["global_step5"],
            "it is a checkpoint of DeepSpeed; .* --from deepspeed",
        ),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
        (["notes.txt"], "give the --run_dir of a training run"),
    ],
)
def test_a_folder_of_another_program_in_place_of_a_run(names: list[str], sentence: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"is no run directory .*{sentence}"):
        run_config(tmp_path)


def test_weights_in_place_of_a_run_are_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(_torch(legacy=False))
    with pytest.raises(UserError, match="it is a torch file; tools/convert_checkpoint.py makes a run"):
        check_checkpoint_path(str(tmp_path / "x.pt"), "--resume")


def test_folders_pipes_and_what_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    folder, pipe = (
        kind_of_file(tmp_path),
        kind_of_file(tmp_path / "pipe"),
    )
    assert folder is not None and folder.id == "folder"
    assert pipe is not None and pipe.id == "special"
    assert kind_of_file(tmp_path / "gone") is None
