"""A folder of tars has one writer: a second is refused, a dead one's is gone on with, a lost one finishes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.owners import elsewhere, killed_owner, leave_owner, living_owner
from megadit.config import DataConfig
from megadit.data.shards.naming import MANIFEST, Sharding
from megadit.data.shards.writing import SetWriter, make_shards
from megadit.files.owner_file import FILE
from megadit.files.ownership import TIMEOUT, FolderInUse, OwnershipLost


def writer(folder: Path) -> SetWriter:
    return SetWriter(folder, Sharding("x", per_shard=2), {"command": "test"})


def add(into: SetWriter, *numbers: int) -> None:
    for number in numbers:
        into.add(f"{number:08d}", {"txt": b"a caption"})


def begun(folder: Path) -> None:
    """Two samples in a finished tar, as a start that was cut off leaves them."""
    first = writer(folder)
    add(first, 0, 1, 2)
    first.abandon()
    assert [path.name for path in sorted(folder.glob("*.tar"))] == ["x-000000.tar"]
    assert not (folder / FILE).exists()


def test_a_second_writer_is_refused_and_cleans_nothing_away(tmp_path: Path) -> None:
    begun(tmp_path)
    part = tmp_path / ".x-000001.tar.0123456789abcdef.part"
    part.write_bytes(b"of the first")
    with living_owner(tmp_path) as first:
        with pytest.raises(FolderInUse, match=f"--out: '{tmp_path}' is in use by process {first.pid} on"):
            writer(tmp_path)
        with pytest.raises(FolderInUse, match=f"process {first.pid} on"):  # before the data are looked for
            make_shards(
                DataConfig(name="image-folder", path=str(tmp_path / "no"), image_size=8), tmp_path, Sharding("x", 2)
            )
        assert part.read_bytes() == b"of the first"


def test_a_killed_writer_is_taken_over_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path)
    (tmp_path / ".x-000001.tar.0123456789abcdef.part").write_bytes(b"torn")
    dead = killed_owner(tmp_path)
    second = writer(tmp_path)
    assert second.done == 2
    assert f"is taken over from process {dead.pid} on" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.part"))
    second.abandon()


def test_what_a_silent_writer_may_have_open_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, "0.2")
    begun(tmp_path)
    leave_owner(tmp_path, **elsewhere())
    part = tmp_path / ".x-000001.tar.0123456789abcdef.part"
    part.write_bytes(b"perhaps still written")
    second = writer(tmp_path)
    add(second, 2, 3, 4)
    second.abandon()
    assert part.is_file()


def test_a_writer_that_lost_the_folder_names_no_tar(tmp_path: Path) -> None:
    first = writer(tmp_path)
    add(first, 0, 1)
    (tmp_path / FILE).unlink()
    leave_owner(tmp_path, **elsewhere())
    with pytest.raises(OwnershipLost, match=r"process 4242 on gpu07 \(since .*\) has taken it over"):
        add(first, 2)
    assert not list(tmp_path.glob("*.tar"))
    assert not (tmp_path / MANIFEST).exists()
    assert "gpu07" in (tmp_path / FILE).read_text()


def test_a_refused_folder_keeps_no_owner(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(Exception, match="is not empty"):
        writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
