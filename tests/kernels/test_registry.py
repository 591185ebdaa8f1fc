"""Dispatch of fused operations: what is called, when it is asked whether it works, which names are refused."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from megadit.errors import UserError
from megadit.extensions import FUSED_OPS
from megadit.models import build_model
from megadit.plugins import load_plugins
from megadit.registry import load_object
from megadit_kernels import OPS, Op, gated_residual


@pytest.fixture
def twice() -> Op[[int]]:
    @Op
    def twice(x: Tensor, times: int) -> Tensor:
        """What it computes."""
        return times * 2 * x

    return twice


def test_without_an_implementation_the_reference_runs(twice: Any) -> None:
    assert twice.name == twice.__name__ == "twice" and twice.__doc__ == "What it computes."
    assert twice(torch.ones(1), 3) == 6 and twice.backend_on("cpu") == twice.backend_on("cuda") == "reference"


def test_the_last_that_works_on_the_device_runs(twice: Any) -> None:
    probed: list[str] = []

    def answer(name: str, works: bool) -> Any:
        return lambda: probed.append(name) or works

    twice.implementation("torch", device=None, works=answer("torch", True))(lambda x, times: x + 10)
    twice.implementation("fast", device="cpu", works=answer("fast", True))(lambda x, times: x + 20)
    twice.implementation("absent", device="cpu", works=answer("absent", False))(lambda x, times: x + 30)
    twice.implementation("elsewhere", device="cuda", works=answer("elsewhere", True))(lambda x, times: x + 40)
    assert probed == []  # nothing is tried when it is added
    assert [float(twice(torch.zeros(1), times=3)) for _ in range(3)] == [20, 20, 20]
    assert probed == ["absent", "fast"]  # once, before the first use
    assert twice(torch.zeros(1, device="meta"), 3).shape == (1,)
    assert [twice.backend_on(device) for device in ("cpu", "cuda", "meta")] == ["fast", "elsewhere", "torch"]
    twice.discard("fast")
    assert twice(torch.zeros(1), 3) == 10


def test_a_backend_of_the_probes_needs_no_test_of_its_own(twice: Any) -> None:
    twice.implementation("triton", device="cpu")(lambda x, times: x + 50)
    from megadit_kernels import backends

    expected = "triton" if backends.works("triton") else "reference"
    assert twice.backend_on("cpu") == expected


def test_taken_and_unknown_names_are_refused(twice: Any) -> None:
    twice.implementation("mine", works=lambda: True)(lambda x, times: x)
    for name in ("mine", "reference"):
        with pytest.raises(ValueError, match=f"twice: there is an implementation '{name}' already"):
            twice.implementation(name, works=lambda: True)
    with pytest.raises(ValueError, match=r"twice: 'tritn' is none of cuda, .*; say by works= when it runs"):
        twice.implementation("tritn")


def test_every_op_is_listed_and_a_plugin_adds_one_under_a_new_name(twice: Any) -> None:
    assert {name: load_object(path).name for name, path in OPS.items()} == {name: name for name in OPS}
    with pytest.raises(UserError, match="fused operation 'gated_residual': there is one of that name already"):
        FUSED_OPS.add("gated_residual", twice)
    FUSED_OPS.add("twice", twice)
    try:
        assert FUSED_OPS.names() == (*OPS, "twice") and FUSED_OPS.get("twice") is twice
    finally:
        FUSED_OPS.discard("twice")


def test_a_name_that_a_plugin_finds_taken_is_told_in_a_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    text = """
        def register():
            from megadit_kernels import gated_residual
            gated_residual.implementation("torch", works=lambda: True)
        """
    (tmp_path / "op_that_is_taken.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="cannot be registered .*there is an implementation 'torch' already"):
        load_plugins(["op_that_is_taken"], "--plugins")


@pytest.fixture
def counted() -> Iterator[list[str]]:
    """Implementations for the CPU of every op, that note their calls."""
    calls: list[str] = []

    def noted(op: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            calls.append(op.name)
            return op.reference(*args, **options)

        return function

    ops = [load_object(path) for path in OPS.values()]
    for op in ops:
        op.implementation("counted", device="cpu", works=lambda: True)(noted(op))
    yield calls
    for op in ops:
        op.discard("counted")


def test_layers_call_what_is_dispatched(counted: list[str]) -> None:
    config = tiny_dit(depth=1)
    model = build_model(config)
    with torch.no_grad():
        model(*dit_inputs(config))
    # Patches, 2 linears of the timestep, 4 and a modulation of the block, the readout and its modulation. Of the norms
    # the block's first and the final layer's stand alone, of the residuals the block's last.
    assert {name: counted.count(name) for name in OPS} == {
        "scaled_linear": 10,
        "norm_modulate": 2,
        "gated_residual": 1,
        "residual_norm_modulate": 1,
        "swiglu": 0,
        "keyed_normal": 0,
        "mix_noise": 0,
        "squared_error": 0,
        "variance_bound": 0,
        "qk_norm": 0,
        "bias_gelu": 1,
        "attention": 1,
    }
    assert gated_residual.backend_on("cpu") == "counted"
