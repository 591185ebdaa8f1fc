"""Torch files that are written tensor by tensor are what torch.save would write."""

from __future__ import annotations

import weakref
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadit.convert.deferred import deferred
from megadit.convert.torch_files.write import save_streaming
from megadit.files.file_kind import kind_of_file


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_them_mapped_or_not(tmp_path: Path, mapped: bool) -> None:
    weights: dict[str, Tensor] = OrderedDict(
        a=torch.randn(3, 5), cut=torch.randn(6, 4)[1:3], turned=torch.randn(4, 3).T, scalar=torch.tensor(2.0),
        empty=torch.empty(0, 3), half=torch.randn(5).half(), brain=torch.randn(5).bfloat16(),
        count=torch.tensor([1, 2]), mask=torch.tensor([True, False]),
    )  # fmt: skip
    value: dict[str, Any] = {"module": weights, "step": 3, "shape": torch.Size([1, 2]), "rest": [None, (1.5, "x")]}
    save_streaming(value, tmp_path / "x.pt")
    values = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
    assert {**values, "module": None} == {**value, "module": None} and list(values["module"]) == list(weights)
    for name, tensor in weights.items():
        read = values["module"][name]
        assert read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(read, tensor)
        assert read.untyped_storage().nbytes() == tensor.nbytes  # and not all that it was cut from
    assert kind_of_file(tmp_path / "x.pt") == kind_of_file(saved(tmp_path / "y.pt", value))


def saved(file: Path, value: Any) -> Path:
    torch.save(value, file)
    return file


def test_the_archive_is_sound_and_its_values_are_aligned(tmp_path: Path) -> None:
    save_streaming({f"{number}": torch.randn(number + 1) for number in range(9)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
    values = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    first = values["0"].data_ptr()
    assert all((value.data_ptr() - first) % 64 == 0 for value in values.values())


def test_one_tensor_is_in_memory_at_a_time_and_written_once(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def load(number: int) -> Tensor:
        alive.append(sum(each() is not None for each in made))
        value = torch.full((4,), float(number))
        made.append(weakref.ref(value))
        return value

    values = {str(number): deferred([4], torch.float32, partial(load, number)) for number in range(5)}
    save_streaming({"a": values, "again": values["3"]}, tmp_path / "x.pt")
    assert alive == [0] * 5
    values = torch.load(tmp_path / "x.pt", weights_only=True)
    assert [float(values["a"][str(number)][0]) for number in range(5)] == [0, 1, 2, 3, 4]
    assert float(values["again"][0]) == 3
