"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from megadit.errors import UserError
from megadit.files.paths import ARRAYS, PNG, atomic_write, check_folder, check_output, is_file_name, save_tensors


def test_the_file_has_its_name_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.suffix == ".yaml"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_file_of_a_name_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a.yaml"
    for text in ("one", "two"):
        with atomic_write(path, first=True) as temporary:
            temporary.write_text(text)
    assert path.read_text() == ("one" if links else "two") and list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "nowhere" / "a.yaml") as temporary:
        temporary.write_text("new")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_tensors_are_as_readable_as_other_new_files(tmp_path: Path, mask: int) -> None:
    from safetensors import safe_open

    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)}, {"of": "a test"}, sync=True)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        assert file.metadata() == {"of": "a test"} and file.get_tensor("x").tolist() == [0, 1, 2]


def test_tensors_that_do_not_fit_on_the_disk_are_an_os_error_and_leave_nothing(tmp_path: Path) -> None:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, said",
    [
        ("dangling", "'{0}/dangling' cannot be written (it is a link to '{0}/gone', which is not there)"),
        ("dangling/run", "'{0}/dangling/run' cannot be written ('{0}/dangling' is a link to '{0}/gone', which is not"),
        ("circle", "'{0}/circle' cannot be written (it is a link that leads in a circle)"),
        ("file", "'{0}/file' cannot be written (it is a file, not a folder)"),
        ("file/a/b", "'{0}/file/a/b' cannot be written ('{0}/file' is a file, not a folder)"),
        ("new/" + 300 * "n", "is longer than a name's 255 bytes; shorten it"),
        ("new/" + 200 * "ñ", "is longer than a name's 255 bytes; shorten it"),
        (2500 * "n/", "has more than 4000 bytes; shorten it"),
    ],
)
def test_paths_that_cannot_be_a_folder(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        check_folder(tmp_path / name, "--run_dir")
    assert str(refused.value).startswith("--run_dir: ") and said.format(tmp_path) in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_that_can_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    for name in (".", "there", "link", "link/new/run", str(tmp_path / "new" / ("n" * 255)), "../x"):
        check_folder(Path(name), "--run_dir")


def test_an_output_may_replace_its_own_kind_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.savez(tmp_path / "x.npz", arr_0=np.zeros(3))
    arrays = (tmp_path / "x.npz").read_bytes()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pt")  # a zip, too
    weights = (tmp_path / "x.pt").read_bytes()
    for content, marks, stays in (
        (None, PNG, True), (b"", PNG, True), (b"\x89PNG\r\n", PNG, True), (b"a: 1", PNG, False),
        (arrays, ARRAYS, True), (weights, ARRAYS, False), (arrays, PNG, False),
    ):  # fmt: skip
        if content is not None:
            path.write_bytes(content)
        if stays:
            check_output(path, "--out", "picture", marks)
        else:
            with pytest.raises(UserError, match=r"^--out: '.*a\.bin' is no picture and would be replaced; choose"):
                check_output(path, "--out", "picture", marks)
    check_output(Path("/dev/null"), "--out", "picture", PNG)


@pytest.mark.parametrize("name", ["a.tar", "..a", "model-00001-of-00002.safetensors", "é" * 127])
def test_a_name_that_a_folder_could_hold(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a\\b", "a\0", "é" * 128, "\ud800"])
def test_what_is_no_name_of_a_file(name: str) -> None:
    assert not is_file_name(name)
