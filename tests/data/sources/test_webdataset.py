"""Tars as a set: equal to the set they were made of, exact, quick to open, and refused when they are not whole."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from helpers.data.tars import png, write_tar
from megadit.config import DataConfig
from megadit.data import BatchLayout, BatchStream, build_datasets, check_images, describe
from megadit.data.shards import shard_files
from megadit.data.shards.index import build_index, scan
from megadit.data.shards.naming import Sharding, split_member
from megadit.data.shards.shard_files import ShardFile, expand
from megadit.data.shards.tar_set import TarSet, load_tars
from megadit.data.shards.writing import make_shards
from megadit.errors import UserError

DIGITS = DataConfig(name="digits")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits in four tars."""
    folder = tmp_path_factory.mktemp("tars") / "digits"
    make_shards(DIGITS, folder, Sharding("digits", 500))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "digits"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(path: Path | str, **more: object) -> DataConfig:
    return DataConfig.model_validate({"name": "webdataset", "path": str(path), **more})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_the_tars_are_the_set(made: Path) -> None:
    for ours, theirs in zip(build_datasets(config(made)), build_datasets(DIGITS), strict=True):
        assert describe(ours) == describe(theirs)
        for i in range(0, len(theirs), 7):
            assert torch.equal(ours.image(i), theirs.image(i))
            assert (ours.label(i), ours.caption(i)) == (theirs.label(i), theirs.caption(i))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_batches_are_the_same_with_any_ranks_and_workers(made: Path, ranks: int, workers: int) -> None:
    tars, memory = build_datasets(config(made))[0], build_datasets(DIGITS)[0]
    for rank in range(ranks):
        layout = BatchLayout(16, ranks, rank, 8)
        stream = BatchStream(tars, layout, 3, True, workers, start_step=5)
        with stream, BatchStream(memory, layout, 3, True, 0, start_step=5) as reference:
            for ours, theirs in islice(zip(stream, reference, strict=True), 4):
                assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
                assert ours.captions == theirs.captions


def test_webdataset_reads_what_is_written(made: Path) -> None:
    theirs = list(webdataset.WebDataset(str(made / "digits-{000000..000003}.tar"), shardshuffle=False).decode("pil"))
    assert len(theirs) == 1797
    assert {"png", "json", "txt", "cls"} <= set(theirs[0]) and theirs[7]["__key__"] == "00000007"
    assert theirs[7]["txt"] == "the handwritten digit 7" and theirs[7]["cls"] == 7


def test_a_pattern_takes_some_of_the_shards(made: Path) -> None:
    part = load_tars(config(made / "digits-{000001..000002}.tar"))
    whole = load_tars(config(made))
    assert len(part) == 1000 and part.bases == whole.bases[500:1500]
    assert torch.equal(part.image(999), whole.image(1499)) and part.caption(999) == whole.caption(1499)
    assert len(load_tars(config(made / "digits-000003.tar"))) == 297


def test_captions_in_any_script_survive(tmp_path: Path) -> None:
    source = tmp_path / "källa"
    source.mkdir()
    words = ["дерево 🌲", "猫\n二匹", 'a "quoted" cat', ""]
    lines = []
    for number, text in enumerate(words):
        (source / f"é{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"é{number}.png", "caption": text}))
    (source / "metadata.jsonl").write_text("\n".join(lines))
    data = DataConfig(name="image-folder", path=str(source), image_size=8, condition="none")
    make_shards(data, tmp_path / "ut", Sharding("ut", 3))
    tars = load_tars(config(tmp_path / "ut", condition="none"))
    assert [tars.caption(i) for i in range(4)] == words and tars.bases == ("é0", "é1", "é2", "é3")


def test_other_peoples_tars_are_scanned_once(tmp_path: Path) -> None:
    members = {}
    for i in range(6):
        members |= {f"a/{i}.jpg": png(i, 12), f"a/{i}.txt": f"picture {i}".encode(), f"a/{i}.cls": str(i % 3).encode()}
    write_tar(tmp_path / "x-0.tar", {**members, "a/.hidden": b"", "a/5.note": b"of no use"})
    tars = load_tars(config(tmp_path, image_size=8))
    assert (tars.name, len(tars), tars.classes, tars.bases[4]) == ("webdataset", 6, ("0", "1", "2"), "a/4")
    assert tars.image(3).shape == (3, 8, 8) and tars.caption(3) == "picture 3" and tars.label(4) == 1
    [cached] = (tmp_path / "cache").rglob("*.safetensors")
    cached.write_bytes(b"damaged")
    assert len(load_tars(config(tmp_path, image_size=8))) == 6
    with pytest.raises(UserError, match="has no label"):
        write_tar(tmp_path / "x-1.tar", {"b.png": png()})
        load_tars(config(tmp_path))


def test_the_index_of_many_samples_opens_at_once(tmp_path: Path) -> None:
    """10,000 samples; scanned, then from the cache, then 1,000 of them read out of order."""
    picture = png()
    write_tar(tmp_path / "x-0.tar", {f"{i:06d}.png": picture for i in range(10_000)})
    begin = time.process_time()
    load_tars(config(tmp_path, condition="none"))
    scanned = time.process_time() - begin
    begin = time.process_time()
    tars = load_tars(config(tmp_path, condition="none", image_size=8))
    opened = time.process_time() - begin
    assert opened < 0.5 and opened < scanned
    begin = time.process_time()
    for i in range(0, 10_000, 10):
        tars.member((i * 7919) % 10_000, "png")
    assert time.process_time() - begin < 0.5


def test_sets_travel_to_processes_and_files_stay_few(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_files._descriptor.cache_clear()
    tars = load_tars(config(made))
    first = tars.image(0)
    other = pickle.loads(pickle.dumps(tars))
    assert torch.equal(other.image(0), first)
    child = os.fork()
    if child == 0:  # reads at its own places, beside the parent
        os._exit(0 if all(torch.equal(tars.image(i), other.image(i)) for i in (0, 600, 1200, 1700)) else 1)
    assert all(torch.equal(tars.image(i), other.image(i)) for i in (1700, 1200, 600, 0))
    assert os.waitpid(child, 0)[1] == 0
    assert shard_files._descriptor.cache_info().currsize == 4 and shard_files._descriptor.cache_info().maxsize == 64
    before = len(os.listdir("/proc/self/fd"))
    shard_files._descriptor.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before - 4


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "digits-000002.tar").unlink(), r"digits-000002\.tar of .* cannot be read .* name the shards"),
        (lambda f: os.truncate(f / "digits-000001.tar", 512 * 40), r"digits-000001\.tar has 20480 bytes, but \d+ were"),
        (lambda f: (f / "more.tar").write_bytes(b""), r"more\.tar is not in .*manifest\.json; take it out"),
        (lambda f: (f / "index.safetensors").unlink(), r"index\.safetensors is missing; copy the whole folder"),
        (lambda f: os.truncate(f / "index.safetensors", 1000), r"index\.safetensors cannot be read"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json' is not valid JSON.*or remove it if"),
        (lambda f: _edit(f, samples=1800), r"has 1797 samples, but manifest\.json says 1800"),
        (lambda f: _edit(f, version=9), r"its version is 9, this megadit reads 1"),
        (lambda f: _edit(f, samples="many"), r"manifest\.json' has samples 'many', which must be a whole"),
        (lambda f: _edit(f, shards=[]), r"digits-000000\.tar is not in .*manifest\.json"),
        (
            lambda f: _edit(f, shards=[{"file": "../x.tar", "samples": 1, "bytes": 1, "sha256": ""}]),
            r"shards\[0\] has file '\.\./x\.tar', which must be the name of a tar beside",
        ),
        (lambda f: _edit(f, made=[]), r"manifest\.json' has made \[\], which must be keys and values"),
        (lambda f: _edit(f, classes="0123456789"), r"manifest\.json' has classes '0123456789', which must be a list"),
        (lambda f: _edit(f, stored={"channels": 4.5}), r"stored has channels 4\.5, which must be a whole"),
    ],
    ids=["missing", "truncated", "strange", "no-index", "torn-index", "torn-manifest", "fewer", "version", "samples",
         "no-shards", "outside", "made", "classes", "stored"],
)  # fmt: skip
def test_what_is_not_whole_is_refused_before_training(folder: Path, damage, sentence: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=rf"^data\.path: .*{sentence}"):
        build_datasets(config(folder))


def _edit(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, **changes}))


def test_changed_bytes_of_the_right_number_are_found_by_the_deep_check(folder: Path) -> None:
    train, _ = build_datasets(config(folder))
    assert check_images(train).files == 4
    shard = folder / "digits-000002.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"handwritten") + 3] ^= 1
    shard.write_bytes(data)
    train, _ = build_datasets(config(folder))
    with pytest.raises(UserError, match=r"digits-000002\.tar has other bytes than were written \(SHA-256\)"):
        check_images(train)


def test_a_tar_cut_between_two_members_is_torn(tmp_path: Path) -> None:
    """tarfile and WebDataset read such a tar without a word, and miss its last samples."""
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(5)})
    last = scan(ShardFile.of(path))[3].spans["png"]
    os.truncate(path, last[0] - 512)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 3
    with pytest.raises(UserError, match=r"x\.tar is torn: .* copy the tar again"):
        scan(ShardFile.of(path))
    os.truncate(path, last[0] - 600)
    with pytest.raises(UserError, match=r"x\.tar is (torn|not a whole)"):
        scan(ShardFile.of(path))


@pytest.mark.parametrize("name", ["0.pth", "0.pkl", "0.features.pt", "0.pickle"])
def test_members_that_would_be_unpickled_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": png(), name: pickle.dumps([1])})
    with pytest.raises(UserError, match=rf"x\.tar holds {name}, which would have to be unpickled"):
        load_tars(config(tmp_path))


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    data = npy(np.array([{"a": 1}], dtype=object))
    shard = ShardFile.of(write_tar(tmp_path / "x.tar", {"0.latent.npy": data}))
    index = build_index([scan(shard)])
    from megadit.data.dataset import StoredFacts

    stored = StoredFacts(channels=1, size=1)
    tars = TarSet("s", (), 3, 8, "", str(tmp_path), (shard,), index, stored=stored)
    with pytest.raises(UserError, match=r"0\.latent\.npy in .*x\.tar is no array .*pickled objects"):
        tars.image(0)


def test_latents_without_a_manifest_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"0.latent.npy": npy(np.zeros((4, 2, 2), np.float16))})
    with pytest.raises(UserError, match=r"0 in .*x\.tar has no image .*need the manifest\.json"):
        load_tars(config(tmp_path))


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    for path, sentence in (
        (None, "not given; webdataset needs a folder of tars"),
        (str(tmp_path), r"has no \.tar files; give the folder"),
        (str(tmp_path / "x-{000000..000002}.tar"), r"no file .*x-000000\.tar \(3 of 3 are missing\)"),
        (str(tmp_path / "x-{000002..000000}.tar"), "counts down"),
    ):
        with pytest.raises(UserError, match=rf"data\.path: .*{sentence}"):
            load_tars(DataConfig(name="webdataset", path=path))


def test_names_and_patterns() -> None:
    assert split_member("a.b/c.latent.NPY") == ("a.b/c", "latent.npy") and split_member("plain") == ("plain", "")
    assert expand("x-{08..10}-{0..1}.tar") == [f"x-{n:02d}-{m}.tar" for n in (8, 9, 10) for m in (0, 1)]
