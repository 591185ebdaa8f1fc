"""Safetensors headers that lie, and types: the file and the tensor are named, nothing else is raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megadit.convert.deferred import loaded
from megadit.convert.safetensors_file import SafetensorsFile
from megadit.errors import UserError


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(first: int, last: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_is_read_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {
        "matrix": torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]).to(dtype),
        "scalar": torch.tensor(1.0).to(dtype),
        "empty": torch.empty(0, 5).to(dtype),
    }
    save_file(values, tmp_path / "x.safetensors")
    tensors = SafetensorsFile(tmp_path / "x.safetensors").tensors()
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        assert tensors[name].dtype == dtype and tensors[name].shape == value.shape
        assert torch.equal(loaded(tensors[name]).view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' leaves a gap before it"),
        ({"a": entry(4, 8)}, 8, "'a' leaves a gap"),
        ({"a": entry(0, 8)}, 4, "it is cut off"),
        ({"a": entry(0, 8)}, 12, "goes on after its last tensor"),
        ({"a": entry(0, 8, [3])}, 8, "'a' of type F32 and shape .* has 12 bytes, its data_offsets say 8"),
        ({"a": entry(8, 0, [2])}, 8, "its data_offsets say -8"),
        ({"a": entry(0, 8, [2**40, 2**40])}, 8, "'a' of type F32"),
        ({"a": entry(0, 0, [0, 2**62, 2**62])}, 0, "'a' has no shape that a tensor can have"),
        ({"a": entry(0, 4, [1] * 100)}, 4, "'a' has no shape"),
        ({"a": entry(0, 8, [-2])}, 8, "'a' has no shape"),
        ({"a": entry(0, 8, [2.0])}, 8, "'a' has no shape"),
        ({"a": entry(0, 8, [True, 2])}, 8, "'a' has no shape"),
        ({"a": entry(0, 8, "2")}, 8, "'a' has no shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' has no two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "'a' has no two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**400]}}, 8, "'a' has no two data_offsets"),
        ({"a": entry(0, 8, dtype="F4")}, 8, "'a' is of type 'F4', which is not read here"),
        ({"a": entry(0, 8, dtype=None)}, 8, "'a' is of type null"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "'a' is of type"),
        ({"a": [1]}, 8, "'a' is of type null"),
        ([1], 0, "its header is no object"),
        (b'{"a": 1, "a": 2}', 0, "its header has the key a twice"),
        (b'{"a": ', 0, "its header is not valid JSON"),
        (b"\xff\xff", 0, "its header is not a text"),
        (b"{" + b"[" * 100_000, 0, "its header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: int, words: str) -> None:
    file = write(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(UserError, match=f"x.safetensors: .*{words}"):
        SafetensorsFile(file)


@pytest.mark.parametrize("length", [1, 3, 10**6, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    file = write(tmp_path / "x.safetensors", {"a": entry(0, 8)}, bytes(8), length=length)
    with pytest.raises(UserError, match="x.safetensors: cannot be read as safetensors"):
        SafetensorsFile(file)


def test_a_header_larger_than_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", b"{}", length=100_000_001)
    with open(file, "r+b") as opened:
        opened.truncate(200_000_000)  # takes no space
    with pytest.raises(UserError, match="its header has 100,000,001 bytes"):
        SafetensorsFile(file)


def test_metadata_and_order_are_kept(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / "x.safetensors", metadata={"key": "value"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"key": "value"}
    with safe_open(tmp_path / "x.safetensors", "pt") as library:
        assert sorted(file.tensors()) == sorted(library.keys())


def test_a_file_that_is_cut_after_it_was_opened_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    values = SafetensorsFile(tmp_path / "x.safetensors").tensors()["a"]
    with open(tmp_path / "x.safetensors", "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match="cut off|ends within 'a'"):
        loaded(values)
