"""Shards: the index decides which tensor lies where, names lead nowhere else, and what is not whole is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadit.convert.conversion import ConversionResult, convert
from megadit.errors import UserError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
A, B = torch.arange(3.0), torch.arange(8.0).reshape(2, 4)


def make(folder: Path, weight_map: Any = None, **more: Any) -> Path:
    """Two shards of one tensor each, and their index with ``weight_map`` and ``more``."""
    folder.mkdir(exist_ok=True)
    save_file({"a": A}, folder / ONE)
    save_file({"b": B}, folder / TWO)
    write_index(folder / INDEX, {"a": ONE, "b": TWO} if weight_map is None else weight_map, **more)
    return folder


def write_index(file: Path, weight_map: Any, **more: Any) -> None:
    file.write_text(json.dumps({"weight_map": weight_map, **more}))


def read(source: Path, kind: str = "safetensors") -> tuple[dict[str, Tensor], ConversionResult]:
    """What a conversion makes of ``source``."""
    target = source.parent / "out.safetensors"
    outcome = convert(kind, "safetensors", source, target)
    tensors = load_file(target)
    target.unlink()
    return tensors, outcome


def same(tensors: Mapping[str, Tensor], **expected: Tensor) -> bool:
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], value) for name, value in expected.items()
    )


def refused(source: Path, words: str, kind: str = "safetensors") -> None:
    with pytest.raises(UserError, match=words):
        convert(kind, "safetensors", source, source.parent / "out.safetensors")
    assert not (source.parent / "out.safetensors").exists()


def test_shards_with_their_index_are_read(tmp_path: Path) -> None:
    tensors, outcome = read(make(tmp_path / "in", metadata={"total_size": 44}))
    assert same(tensors, a=A, b=B) and not outcome.notes
    tensors, _ = read(tmp_path / "in" / INDEX)  # by name
    assert same(tensors, a=A, b=B)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": TWO, "b": TWO}, f"{ONE}: holds 'a', though {INDEX} says that it lies in {TWO}"),
        ({"a": TWO, "b": ONE}, f"{ONE}: holds 'a', though .* says that it lies in {TWO}"),
        ({"a": ONE, "b": TWO, "c": TWO}, f"{TWO}: does not hold 'c', though {INDEX} says so"),
        ({"a": ONE}, f"{TWO}: holds 'b', which {INDEX} does not name"),
        ({}, "has no weight_map"),
        ([ONE, TWO], "has no weight_map"),
        (None, "has no weight_map"),
        ({"a": ONE, "b": None}, "puts 'b' into null"),
        ({"a": ONE, "b": 2}, "puts 'b' into 2,"),
        ({"a": ONE, "b": [TWO]}, "puts 'b' into"),
        ({"a": ONE, "b": ""}, "puts 'b' into ''"),
        ({"a": ONE, "b": f"../{TWO}"}, r"puts 'b' into '\.\./.*never looked for elsewhere"),
        ({"a": ONE, "b": f"./{TWO}"}, r"puts 'b' into '\./"),
        ({"a": ONE, "b": f"/etc/{TWO}"}, "puts 'b' into '/etc/"),
        ({"a": ONE, "b": f"..\\{TWO}"}, r"puts 'b' into '\.\."),
        ({"a": ONE, "b": f"x\0{TWO}"}, "puts 'b' into"),
        ({"a": ONE, "b": "\ud800.safetensors"}, "puts 'b' into"),
        ({"a": ONE, "b": "x" * 300 + ".safetensors"}, "puts 'b' into"),
        ({"a": ONE, "b": ".."}, r"puts 'b' into '\.\.'"),
        ({"a": ONE, "b": "pytorch_model-00002-of-00002.bin"}, "which is no .safetensors file"),
        ({"a": ONE, "b": "model-00003-of-00002.safetensors"}, "is missing, though"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    make(tmp_path / "in")
    text = json.dumps({} if weight_map is None else {"weight_map": weight_map})
    (tmp_path / "in" / INDEX).write_text(text)
    refused(tmp_path / "in", words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no index of shards: it is an empty file; fetch or copy it again"),
        ("{", "is no index of shards: it is not valid JSON"),
        ("[1]", "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key a twice"),
        ("[" * 100_000, "nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n", "git-LFS pointer"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path: Path, text: str, words: str) -> None:
    make(tmp_path / "in")
    (tmp_path / "in" / INDEX).write_text(text)
    refused(tmp_path / "in", words)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in")
    save_file({"a": A, "b": B}, tmp_path / "in" / TWO)
    refused(tmp_path / "in", f"{TWO}: holds 'a', which {ONE} holds too")
    (tmp_path / "in" / INDEX).unlink()
    refused(tmp_path / "in", f"{TWO}: holds 'a', which {ONE} holds too")


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "in")
    save_file({"b": B, "c": A}, tmp_path / "in" / TWO)
    refused(tmp_path / "in", f"{TWO}: holds 'c', which {INDEX} does not name")


def test_links_of_the_hubs_cache_are_read_and_dangling_ones_named(tmp_path: Path) -> None:
    make(tmp_path / "blobs")
    (tmp_path / "in").mkdir()
    for name in (ONE, TWO, INDEX):
        (tmp_path / "in" / name).symlink_to(f"../blobs/{name}")
    tensors, _ = read(tmp_path / "in")
    assert same(tensors, a=A, b=B)
    (tmp_path / "blobs" / TWO).unlink()
    refused(tmp_path / "in", rf"is a link to '\.\./blobs/{TWO}', which is missing; .*cp -L.*{INDEX} names it")
    (tmp_path / "blobs" / INDEX).unlink()
    refused(tmp_path / "in", rf"{INDEX}: is a link to '\.\./blobs/{INDEX}', which is missing")


@pytest.mark.parametrize("kind", ["safetensors", "fp32-state-dict"])
def test_the_hubs_cache_itself_is_told_with_its_snapshot(tmp_path: Path, kind: str) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    make(snapshot)
    refused(tmp_path / "models--a--b", f"is a cache of the Hugging Face hub; give its snapshot '{snapshot}'", kind)


def test_an_index_of_another_name_decides_on_the_shards_that_it_names(tmp_path: Path) -> None:
    folder, other = make(tmp_path / "in"), "model.fp16.safetensors.index.json"
    (folder / INDEX).rename(folder / other)
    tensors, outcome = read(folder)
    assert same(tensors, a=A, b=B) and not outcome.notes
    write_index(folder / other, {"a": TWO, "b": TWO})
    refused(folder, f"{ONE}: holds 'a', though {other} says that it lies in {TWO}")
    write_index(folder / "x.safetensors.index.json", {"a": ONE, "b": TWO})
    refused(folder, "several indices of the same shards")


@pytest.mark.parametrize("what", ["folder", "pipe", "device"])
def test_a_shard_that_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path, what: str) -> None:
    shard = make(tmp_path / "in") / TWO
    shard.unlink()
    if what == "folder":
        shard.mkdir()
    elif what == "pipe":
        os.mkfifo(shard)
    else:
        shard.symlink_to("/dev/zero")
    refused(tmp_path / "in", f"{TWO}: is no regular file, though {INDEX} names it")
    (tmp_path / "in" / INDEX).unlink()
    refused(tmp_path / "in", "cannot be read as safetensors: it is (a folder|no regular file)")


@pytest.mark.parametrize("total", [43, "44", 1e300])
def test_a_total_size_that_is_wrong_is_told(tmp_path: Path, total: Any) -> None:
    tensors, outcome = read(make(tmp_path / "in", metadata={"total_size": total}))
    assert same(tensors, a=A, b=B)
    assert any("says total_size" in note and "44 bytes" in note for note in outcome.notes)


def test_shards_of_several_types_are_told(tmp_path: Path) -> None:
    make(tmp_path / "in")
    save_file({"b": B.half()}, tmp_path / "in" / TWO)
    tensors, outcome = read(tmp_path / "in")
    assert same(tensors, a=A, b=B) and any("weights as float16, float32" in note for note in outcome.notes)


def test_shards_without_an_index_are_read_where_all_are_there(tmp_path: Path) -> None:
    (make(tmp_path / "in") / INDEX).unlink()
    tensors, outcome = read(tmp_path / "in")
    assert same(tensors, a=A, b=B) and any("no index: all 2" in note for note in outcome.notes)
    (tmp_path / "in" / ONE).unlink()
    refused(tmp_path / "in", f"{TWO}' is one of 2 shards: missing is number 1; copy all shards")
    save_file({"a": A}, tmp_path / "in" / "x-00001-of-99999999999.safetensors")
    (tmp_path / "in" / TWO).rename(tmp_path / TWO)
    refused(tmp_path / "in", "99999999999 shards: missing is number 2, 3, 4, 5, 6, …;")
    refused(tmp_path / TWO, "is shard 2 of 2 and not the whole")


def test_torch_shards_follow_the_same_rules(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, values in zip(names, ({"a": A}, {"b": B}), strict=True):
        torch.save(values, folder / name)
    write_index(folder / "pytorch_model.bin.index.json", {"a": names[0], "b": names[1]})
    tensors, _ = read(folder, "fp32-state-dict")
    assert same(tensors, a=A, b=B)
    write_index(folder / "pytorch_model.bin.index.json", {"a": names[1], "b": names[0]})
    refused(folder, f"{names[0]}: holds 'a', though .* says that it lies in {names[1]}", "fp32-state-dict")


@pytest.mark.parametrize(
    "names",
    [
        ["model.fp16.safetensors"],
        ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
    ],
)
def test_variants_are_read_and_the_plain_weights_go_before_them(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    parts = [{"a": A.half(), "b": B.half()}] if len(names) == 1 else [{"a": A.half()}, {"b": B.half()}]
    for name, values in zip(names, parts, strict=True):
        save_file(values, folder / name)
    if len(names) == 2:
        write_index(folder / "model.safetensors.index.fp16.json", {"a": names[0], "b": names[1]})
    tensors, _ = read(folder)
    assert same(tensors, a=A, b=B)
    save_file({"a": A + 1, "b": B}, folder / "model.safetensors")
    tensors, outcome = read(folder)
    assert same(tensors, a=A + 1, b=B)
    assert any("model.safetensors is taken; left aside: model" in note and "fp16" in note for note in outcome.notes)


def test_several_sets_of_weights_are_never_guessed_between(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("model.fp16.safetensors", "model.ema.safetensors"):
        save_file({"a": A}, folder / name)
    refused(folder, r"several files \(model.ema.safetensors, model.fp16.safetensors\) and no index; name one")
    make(folder)
    make(tmp_path / "other")
    for name in (ONE, TWO):
        os.replace(tmp_path / "other" / name, folder / name.replace("model", "b"))
    write_index(folder / "b.safetensors.index.json", {"a": ONE.replace("model", "b"), "b": TWO.replace("model", "b")})
    tensors, _ = read(folder)  # the usual name
    assert same(tensors, a=A, b=B)
    for file in sorted(folder.glob("model*")):
        os.replace(file, folder / file.name.replace("model", "c"))
    write_index(folder / "c.safetensors.index.json", {"a": ONE.replace("model", "c"), "b": TWO.replace("model", "c")})
    refused(folder, r"several indices \(b.safetensors.index.json, c.safetensors.index.json\); name one")
