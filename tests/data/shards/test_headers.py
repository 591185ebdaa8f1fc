"""A tar is read to its end or refused, naming tar, byte and member: nothing makes a set shorter without a word."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.data.tars import END, block, padded, png, samples, tar_bytes, write_tar
from megadit.data.shards.index import scan
from megadit.data.shards.scanning import ScanSummary
from megadit.data.shards.shard_files import ShardFile
from megadit.errors import UserError

WHOLE = tar_bytes(samples(0, 4))
FIRST, SECOND = 0, 1024  # headers of 0000.png and 0000.cls
LAST_END = 12 * 1024  # where the end mark begins


def refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        scan(ShardFile.of(path))
    sentence = str(caught.value)
    assert sentence.startswith("data.path: ") and str(path) in sentence and "\n" not in sentence
    return sentence.replace(str(path), "x.tar")


def read(tmp_path: Path, data: bytes) -> tuple[list[str], ScanSummary]:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    summary = ScanSummary()
    return [sample.key for sample in scan(ShardFile.of(path), summary)], summary


def over(begin: int, new: bytes, data: bytes = WHOLE) -> bytes:
    return data[:begin] + new + data[begin + len(new) :]


def extended(records: bytes, name: str = "a.png", type: bytes = b"x") -> bytes:
    return block("pax", len(records), type) + padded(records) + block(name, 3) + padded(b"abc") + END


MORE = tar_bytes(samples(4, 8))
CASES: dict[str, tuple[bytes, str]] = {
    "joined": (WHOLE + MORE, "end at byte 12288, after 0003.txt: other members begin at byte 20480"),
    "joined without padding": (WHOLE[:LAST_END] + END + MORE, "other members begin at byte 13312"),
    "joined behind one zero block": (WHOLE[:LAST_END] + END[:512] + MORE, "other members begin at byte 12800"),
    "joined behind much padding": (WHOLE + b"\0" * 2**21 + MORE, "other members begin at byte 2117632"),
    "text behind the end": (WHOLE + b"\n", "after 0003.txt: byte 20480 is not zero. Zeros lie over a part of it"),
    "a wrong checksum": (over(SECOND, b"X"), "damaged at byte 1024, after 0000.png: there is no header of a member"),
    "a header overwritten": (over(SECOND, b"X" * 512), "damaged at byte 1024, after 0000.png"),
    "a header of zeros": (over(SECOND, bytes(512)), "end at byte 1024, after 0000.png: byte 1536 is not zero"),
    "a member of zeros": (over(SECOND, bytes(1024)), "at byte 1024, after 0000.png: other members begin at byte 2048"),
    "the first header of zeros": (over(FIRST, bytes(512)), "end at byte 0: byte 512 is not zero"),
    "the first header damaged": (over(FIRST, b"X"), "is not a whole, uncompressed tar"),
    "cut in data": (WHOLE[:520], f"it ends at byte 520, within 0000.png, which goes on to byte {512 + len(png())}"),
    "cut in padding": (WHOLE[:1600], "torn: it ends at byte 1600, after 0000.cls, without the mark of a tar's end"),
    "cut in a header": (WHOLE[:1200], "torn: it ends at byte 1200, after 0000.png, without the mark of a tar's end"),
    "cut between members": (WHOLE[:SECOND], "torn: it ends at byte 1024, after 0000.png, without the mark"),
    "cut in the end mark": (WHOLE[: LAST_END + 100], "torn: it ends at byte 12388, after 0003.txt, without the mark"),
    "a size beyond the end": (over(1024, block("0000.cls", 2**30)), "within 0000.cls, which goes on to byte 10737433"),
    "a size of 2^70": (over(1024, block("0.cls", size_field=b"\x80\x40" + bytes(9))), "0.cls is none: it cannot have"),
    "a size below 0": (over(1024, block("0.cls", size_field=b"\xff" * 12)), "0.cls is none: it cannot have -1 bytes"),
    "an octal size below 0": (over(1024, block("0.cls", size_field=b"-1")), "0.cls is none: it cannot have -1 bytes"),
    "a size of letters": (over(1024, block("0.cls", size_field=b"many")), "damaged at byte 1024, after 0000.png"),
    "zeros alone, no whole blocks": (bytes(30725), "holds 30725 zero bytes and nothing else"),
    "zeros alone": (bytes(30720), "holds 30720 zero bytes and nothing else: its copy or download did not end"),
    "empty": (b"", "is not a whole, uncompressed tar: it is an empty file; fetch or copy it again"),
    "gzip": (gzip.compress(WHOLE), "tar: it is compressed by gzip; unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(2000), "tar: it is compressed by zstd; unpack it first"),
    "a web page": (b"<!DOCTYPE html><html>" + b" " * 2000, "tar: it is a web page"),
    "a git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "tar: it is a git-LFS"),
    "a long name of zeros": (block("L", 600, b"L") + bytes(1024) + block("a", 0) + END, "a long name is damaged"),
    "an extended header of zeros": (extended(bytes(600)), "an extended header is damaged"),
    "a damaged extended header": (extended(b"99 path=b.png\n"), "an extended header is damaged"),
    "an extended header of text": (extended(b"path=b.png\n"), "an extended header is damaged"),
    "an extended header of 1 GB": (block("pax", 2**30, b"x") + WHOLE, "header of 1073741824 bytes is no tar's"),
    "an extended header alone": (block("pax", 0, b"x") + END, "an extended header describes no member"),
    "an extended header and the end": (block("pax", 600, b"x") + bytes(512), "the tar ends within an extended header"),
    "a size of words": (extended(b"13 size=many\n"), "a.png is none: it cannot have -1 bytes"),
    "a name with a zero byte": (extended(b"16 path=b\0c.png\n"), "its name holds a zero byte"),
    "one name for all": (extended(b"14 path=b.png\n", type=b"g"), "a header gives one path to all members"),
    "sparse": (block("a.png", 0, b"S") + END, "a.png in x.tar is stored as a sparse file"),
    "sparse in pax": (extended(b"22 GNU.sparse.major=1\n"), "a.png in x.tar is stored as a sparse file"),
    "a later volume": (block("a.png", 0, b"M") + WHOLE, "a part of a multi-volume tar, which goes on with a.png"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "sentence"), CASES.values(), ids=CASES)
def test_what_is_not_whole_is_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    assert sentence in refused(tmp_path, data)


def test_tars_that_were_joined_part_as_the_sentence_says(tmp_path: Path) -> None:
    sentence = refused(tmp_path, WHOLE + MORE)
    first, rest = (word.split()[0] for word in (sentence.split("head -c ")[1], sentence.split("tail -c +")[1]))
    assert read(tmp_path, (WHOLE + MORE)[: int(first)])[0] == ["0000", "0001", "0002", "0003"]
    assert read(tmp_path, (WHOLE + MORE)[int(rest) - 1 :])[0] == ["0004", "0005", "0006", "0007"]


def test_tar_concatenate_joins_what_is_read_whole(tmp_path: Path) -> None:
    """The remedy that the sentence names, where GNU tar is there."""
    for name, data in (("x.tar", WHOLE), ("y.tar", MORE)):
        (tmp_path / name).write_bytes(data)
    try:
        subprocess.run(["tar", "--concatenate", "--file=x.tar", "y.tar"], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no GNU tar here")
    summary = ScanSummary()
    assert len(scan(ShardFile.of(tmp_path / "x.tar"), summary)) == 8 and not summary.remarks()


@pytest.mark.parametrize("zeros", [0, 20480, 2**20, 100, 1_000_000])
def test_more_zeros_than_tar_pads_with_are_told(tmp_path: Path, zeros: int) -> None:
    keys, summary = read(tmp_path, WHOLE + bytes(zeros))
    assert keys == ["0000", "0001", "0002", "0003"]
    remarks = [remark for remark in summary.remarks() if "zero bytes behind its last member" in remark]
    assert bool(remarks) == bool(zeros)
    assert not zeros or f"x.tar ends with {8192 + zeros:,} zero bytes" in remarks[0]


def test_zeros_that_the_file_system_does_not_hold_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE)
    os.truncate(path, 2**33)
    summary = ScanSummary()
    assert len(scan(ShardFile.of(path), summary)) == 4 and summary.zeros == {"x.tar": 2**33 - LAST_END}
    with open(path, "r+b") as file:
        file.seek(2**33 - 5)
        file.write(b"x")
    with pytest.raises(UserError, match=f"byte {2**33 - 5} is not zero"):
        scan(ShardFile.of(path))


def test_a_tar_that_ends_early_is_told(tmp_path: Path) -> None:
    """The second half of a larger tar overwritten by zeros: what is left is a tar, and shorter than it was."""
    data = tar_bytes(samples(0, 40))
    keys, summary = read(tmp_path, data[: 20 * 3 * 1024] + bytes(len(data) - 20 * 3 * 1024))
    assert len(keys) == 20 and "x.tar ends with 71,680 zero bytes" in summary.remarks()[0]


def hard_link(info: tarfile.TarInfo) -> None:
    if info.name in ("0001.png", "README"):
        info.type, info.linkname, info.size = tarfile.LNKTYPE, "0000.png", 0


def symbolic_link(info: tarfile.TarInfo) -> None:
    if info.name in ("0001.png", "README"):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "../0000.png", 0


def pipe(info: tarfile.TarInfo) -> None:
    if info.name in ("0001.png", "README"):
        info.type, info.size = tarfile.FIFOTYPE, 0


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (hard_link, r"0001\.png in .*x\.tar is a hard link to 0000\.png, not a file of its own; .* --hard-dereference"),
        (symbolic_link, r"0001\.png in .*x\.tar is a symbolic link to \.\./0000\.png, not a file"),
        (pipe, r"0001\.png in .*x\.tar is a pipe, not a file"),
    ],
)
def test_a_link_in_place_of_a_file_is_refused(
    tmp_path: Path, changed: Callable[[tarfile.TarInfo], None], sentence: str
) -> None:
    path = write_tar(tmp_path / "x.tar", samples(0, 2), changed=changed)
    with pytest.raises(UserError, match=sentence):
        scan(ShardFile.of(path))
    summary = ScanSummary()
    scan(ShardFile.of(write_tar(path, {"README": b"", "0000.png": png()}, changed=changed)), summary)
    assert summary.skipped == {"bare": 1}


def test_long_names_and_folders_are_read_in_every_format(tmp_path: Path) -> None:
    members = {"./" + "d" * 90 + "/" + "n" * 150 + f"{i}.png": png(i) for i in range(3)}
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / "x.tar", {"./": b"", **members}, format, _folders)
        scanned = scan(ShardFile.of(path))
        assert [sample.key for sample in scanned] == ["d" * 90 + "/" + "n" * 150 + str(i) for i in range(3)]
        offset, size = scanned[2].spans["png"]
        assert path.read_bytes()[offset : offset + size] == png(2)


def _folders(info: tarfile.TarInfo) -> None:
    if info.name.endswith("/"):
        info.type = tarfile.DIRTYPE


def test_what_other_programs_write_is_read(tmp_path: Path) -> None:
    label = block("volume", 0, b"V")
    comment = block("pax_global_header", 20, b"g") + padded(b"20 comment=of a git\n")
    size = block("x", 10, b"x") + padded(b"10 size=3\n") + block("a.png", 2**20) + padded(b"abc")
    base256 = block("b.png", size_field=b"\x80" + bytes(10) + b"\x03") + padded(b"abc")
    old = block("c.png", 3, b"\0") + padded(b"abc")
    keys, summary = read(tmp_path, label + comment + size + base256 + old + END)
    assert keys == ["a", "b", "c"] and not summary.remarks()


def test_any_number_of_extended_headers_is_read_in_a_loop(tmp_path: Path) -> None:
    long = block("././@LongLink", 6, b"L") + padded(b"a.png\0")
    assert read(tmp_path, long * 5000 + block("b.png", 3) + padded(b"abc") + END)[0] == ["a"]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    from megadit.config import DataConfig
    from megadit.data.shards.tar_set import load_tars

    path = tmp_path / "x.tar"
    config = DataConfig(name="webdataset", path=str(tmp_path))
    for make, sentence in (
        (lambda: path.mkdir(), r"cannot read .*x\.tar: it is a folder"),
        (lambda: os.mkfifo(path), r"cannot read .*x\.tar: it is no regular file"),
        (lambda: path.symlink_to("nowhere"), r"cannot read .*x\.tar: No such file or directory; copy it there"),
    ):
        make()
        with pytest.raises(UserError, match=sentence):
            load_tars(config)
        path.rmdir() if path.is_dir() else path.unlink()
