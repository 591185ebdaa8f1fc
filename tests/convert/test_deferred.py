"""Deferred tensors: what is done with them is done when the values are needed, and gives what torch gives at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.convert import from_diffusers, from_official, to_diffusers, to_official
from megadit.convert.contents import ValueCheck
from megadit.convert.conversion import convert
from megadit.convert.deferred import DeferredTensor, deferred, loaded
from megadit.convert.state_dicts import load_tensors
from megadit.models import build_model

MODELS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "dit": (tiny_dit(depth=12), {"heads": 2}),
    "pixart": (tiny_pixart(depth=12), {"heads": 2}),
    "uvit": (tiny_uvit("class"), {"heads": 2}),
    "mmdit": (tiny_mmdit(depth=12, pooled=12), {"heads": 2, "input_size": 8}),
}


def counted(value: Tensor) -> tuple[Tensor, list[int]]:
    """The value, deferred; and the number of times that it was read."""
    reads = [0]

    def load() -> Tensor:
        reads[0] += 1
        return value

    return deferred(value.shape, value.dtype, load), reads


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut": lambda x: x.chunk(3)[1],
    "joined": lambda x: torch.cat([x.chunk(2)[1], x.chunk(2)[0]]),
    "folded": lambda x: (x.double() * 0.3).to(x.dtype),
    "float": lambda x: x.float().contiguous(),
    "flat": lambda x: x.reshape(-1).narrow(0, 3, 5),
    "bits": lambda x: x.float().contiguous().view(-1).view(torch.uint8),
    "turned": lambda x: x.T.contiguous(),
    "stacked": lambda x: x[None],
    "zeros": lambda x: x.new_zeros(3),
    "joined with others": lambda x: torch.cat([x, torch.ones(1, 4, dtype=x.dtype)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operations_wait_and_give_what_torch_gives(name: str, dtype: torch.dtype) -> None:
    value = torch.randn(6, 4).to(dtype)
    lazy, reads = counted(value)
    result, expected = OPERATIONS[name](lazy), OPERATIONS[name](value)
    assert isinstance(result, DeferredTensor) and reads == [0]
    assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(loaded(result), expected)
    assert torch.equal(torch.from_numpy(result.numpy()), expected)


def test_what_needs_the_values_reads_them() -> None:
    value = torch.randn(3, 4)
    lazy, reads = counted(value)
    assert torch.equal(lazy, value) and torch.allclose(lazy, value) and float(lazy[1, 2]) == float(value[1, 2])
    assert reads == [3]
    linear = nn.Linear(4, 3, bias=False)
    linear.load_state_dict({"weight": lazy})
    assert torch.equal(linear.weight.data, value) and reads == [4]
    assert loaded(value) is value and "DeferredTensor([3, 4]" in repr(lazy)


@pytest.mark.parametrize("family", MODELS)
def test_state_dicts_of_files_give_the_same_models(tmp_path: Path, family: str) -> None:
    model, hints = MODELS[family]
    state = state_of(model)
    plain = to_official(model, state)
    save_file({name: value.contiguous() for name, value in plain.items()}, tmp_path / "x.safetensors")
    config, loaded_state = from_official(family, load_tensors(tmp_path / "x.safetensors"), **hints)
    wanted_config, expected = from_official(family, plain, **hints)
    assert config == wanted_config and all(isinstance(value, DeferredTensor) for value in loaded_state.values())
    assert all(torch.equal(value, loaded_state[name]) for name, value in expected.items())
    if family == "uvit":
        return
    config_json, stored = to_diffusers(model, loaded_state)
    again = from_diffusers(config_json, stored)[1]
    assert all(torch.equal(value, again[name]) for name, value in state.items() if "y_embedding" not in name)


def state_of(model: ModelConfig) -> dict[str, Tensor]:
    built = build_model(model, seed=3)
    randomize(built)
    return {name: value.detach().clone() for name, value in built.state_dict().items()}


class Alive:
    """Bytes of what was read from a source and is still in memory, and the most that there were."""

    def __init__(self) -> None:
        self.now = self.most = self.total = self.largest = 0

    def add(self, value: Tensor) -> None:
        size = value.nbytes
        self.now, self.total, self.largest = self.now + size, self.total + size, max(self.largest, size)
        self.most = max(self.most, self.now)
        weakref.finalize(value.untyped_storage(), partial(self._drop, size))

    def _drop(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    counts, original = Alive(), ValueCheck._watched

    def watched(self: ValueCheck, name: str, values: Tensor, start: int) -> Tensor:
        def load() -> Tensor:
            value: Tensor = loaded(values).clone()
            counts.add(value)
            return value

        return original(self, name, deferred(values.shape, values.dtype, load), start)

    monkeypatch.setattr(ValueCheck, "_watched", watched)
    return counts


@pytest.mark.parametrize(
    ("family", "source", "target"),
    [
        ("dit", "official.pt", "megadit"),
        ("dit", "official.safetensors", "megadit"),
        ("mmdit", "official.safetensors", "megadit"),
        ("pixart", "run", "official.pt"),
        ("mmdit", "run", "official.safetensors"),
        ("dit", "run", "safetensors"),
        ("dit", "run", "fp32-state-dict"),
        ("dit", "run", "deepspeed"),
        ("dit", "plain.safetensors", "safetensors"),
    ],
)
def test_a_conversion_holds_a_few_tensors_of_the_source(
    tmp_path: Path, alive: Alive, family: str, source: str, target: str
) -> None:
    model, hints = MODELS[family]
    official, source_path = f"official-{family}", tmp_path / source
    plain = state_of(model)
    state = to_official(model, plain)
    if source == "official.pt":
        torch.save({"model": state}, source_path)
    else:
        chosen = plain if source.startswith("plain") else state
        save_file({name: value.contiguous() for name, value in chosen.items()}, tmp_path / "official.safetensors")
    if source.startswith("plain"):
        (tmp_path / "official.safetensors").rename(source_path)
    elif source == "run":
        convert(official, "megadit", tmp_path / "official.safetensors", source_path, hints=hints)
    before = "safetensors" if source.startswith("plain") else "megadit" if source == "run" else official
    after, name = (official, target) if target.startswith("official") else (target, "out")
    alive.__init__()  # type: ignore[misc]
    convert(before, after, source_path, tmp_path / "target" / name, hints=hints if before == official else None)
    assert alive.total >= sum(value.nbytes for value in state.values()) * 0.9
    assert alive.most <= 4 * alive.largest < alive.total / 4
