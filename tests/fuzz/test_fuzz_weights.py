"""Weights of other programs: safetensors, torch files, shards with an index, folders of diffusers and transformers.

Nothing that a file holds is run, nothing outside its folder is read, and what cannot be read is a sentence.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from helpers.fuzz.hunt import efforts, hunt, mutated, odd_json
from helpers.fuzz.weight_files import HEADER_WORDS, STATE, converted, torch_files
from megadit.convert.torch_files.safe_load import load_file


@efforts
def test_safetensors(effort: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    files = [save(STATE, {"format": "pt"}), save({"a": torch.ones(2)}), save({})]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        converted("safetensors", file)

    hunt(effort, mutated(files, HEADER_WORDS), read, quick=22)


@efforts
def test_odd_headers_of_safetensors(effort: str, tmp_path: Path) -> None:
    """The header is JSON of another writer, or of none."""
    file = tmp_path / "model.safetensors"
    data = save({"a": torch.ones(2), "b": torch.ones(3, 2)}, {"megadit_config": "{}"})
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def read(text: bytes) -> None:
        file.write_bytes(len(text).to_bytes(8, "little") + text + body)
        converted("safetensors", file)

    hunt(effort, odd_json([header], extra=("F16", "F64", "I64", [0, 8], [2], [8, 32], 4, 8)), read, quick=22)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@efforts
def test_an_index_of_shards(effort: str, tmp_path: Path) -> None:
    """model.safetensors.index.json; a weight_map that leads out of the folder reads nothing there."""
    outside = tmp_path / "outside.safetensors"
    save_file({"secret": torch.ones(1)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    names = list(STATE)
    for shard, part in zip(SHARDS, (names[:2], names[2:]), strict=True):
        save_file({name: STATE[name] for name in part}, folder / shard)
    index = {
        "metadata": {"total_size": 100},
        "weight_map": {name: SHARDS[number // 2] for number, name in enumerate(names)},
    }
    odd = (
        "../outside.safetensors",
        str(outside),
        "model.safetensors.index.json",
        ".",
        "..",
        "a\0b",
        SHARDS[0],
        "x/../" + SHARDS[0],
    )

    def read(data: bytes) -> None:
        (folder / "model.safetensors.index.json").write_bytes(data)
        assert "secret" not in converted("safetensors", folder).shapes

    hunt(effort, odd_json([index], extra=odd), read, quick=22)


PICKLE_WORDS = (
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"cos\nsystem\n(S'x'\ntR.",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"\x80\x02",
    b"\x80\x05",
    b"R",
    b".",
    b"(",
    b"t",
    b"}",
    b"u",
    b"b",
    b"\x81",
    b"\x93",
    b"Q",
    b"q\0",
    b"h\0",
    b"\x8a\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f",
    b"K\xff",
    b"ccollections\nOrderedDict\n",
    b"cargparse\nNamespace\n",
    b"PK\3\4",
    b"PK\1\2",
    b"PK\5\6",
)


@efforts
@pytest.mark.filterwarnings("ignore")
def test_torch_files(effort: str, tmp_path: Path) -> None:
    """Whatever stands in a pickle or its archive, none of it runs."""
    file, mark = tmp_path / "model.bin", tmp_path / "it ran"
    files = torch_files(mark)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        try:
            load_file(file)
        finally:
            assert not mark.exists()
        converted("fp32-state-dict", file)

    hunt(effort, mutated(files, PICKLE_WORDS), read, quick=27)


@efforts
@pytest.mark.filterwarnings("ignore")
def test_odd_pickles_in_whole_archives(effort: str, tmp_path: Path) -> None:
    """The zip archive is sound, its pickle is not."""
    file, mark = tmp_path / "model.bin", tmp_path / "it ran"
    whole = torch_files(mark)[0]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickle_name = next(name for name in parts if name.endswith("data.pkl"))

    def read(data: bytes) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, data if name == pickle_name else part)
        try:
            converted("fp32-state-dict", file)
        finally:
            assert not mark.exists()

    hunt(effort, mutated([parts[pickle_name]], PICKLE_WORDS), read, quick=22)
