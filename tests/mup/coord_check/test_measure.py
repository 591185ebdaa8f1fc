"""The coordinate check passes muP, fails SP, and names the layer at which a fault was planted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers.models.tiny_dit import tiny_dit, tiny_mup_dit
from helpers.mup_checks import Fault, coordinate_verdict, plant_spec
from megadit.config import ModelConfig, OptimConfig
from megadit.errors import UserError
from megadit.models import build_model
from megadit.mup.coord_check.plan import CoordPlan, at_width
from megadit.mup.coord_check.record import CoordMeasurement, Recorder
from megadit.mup.coord_check.verdict import CoordVerdict, fit_slope, judge
from megadit.parallel.tensor import TensorLayout

_BASE = 64
_WIDE = (32, 64, 128, 256)


def _check(
    model: ModelConfig,
    widths: tuple[int, ...] = _WIDE,
    seeds: int = 1,
    lr: float = 2.0**-9,
    build: Callable[[ModelConfig, int], nn.Module] = lambda config, seed: build_model(config, seed=seed),
    parametrization: str | None = None,
) -> CoordVerdict:
    optim = OptimConfig(lr=lr, weight_decay=0.1)
    return coordinate_verdict(model, parametrization, widths, seeds=seeds, optim=optim, build=build)


@pytest.mark.parametrize("init", ["fan_in", "original"])
def test_mup_passes_and_sp_fails(init: str) -> None:
    mup = _check(tiny_mup_dit(64, _BASE, init=init), seeds=2)
    assert mup.passed and mup.broken == []
    growths = [module.growth(quantity) for module in mup.modules for quantity in module.slopes]
    assert max(slope for slope in growths if slope is not None) <= 0.15

    sp = _check(tiny_mup_dit(64, _BASE, init=init), seeds=1, parametrization="sp")
    assert not sp.passed
    hidden = [module for module in sp.modules if module.role in ("hidden", "output") and module.module != "output"]
    assert [module.module for module in hidden if module.verdict != "broken"] == []
    assert all((module.growth("update.weight") or 0) >= 0.5 for module in hidden)
    assert next(module for module in sp.modules if module.module == "output").verdict == "affected"


_FAULTS: list[tuple[str, str, Fault, str]] = [
    ("hidden-lr-of-sp", "blocks.0.mlp.fc1.weight", lambda s, m: dataclasses.replace(s, lr_mult=1.0), "too fast"),
    ("input-lr-of-hidden", "x_embedder.proj.weight", lambda s, m: dataclasses.replace(s, lr_mult=1 / m), "too slowly"),
    ("bias-lr-of-hidden", "blocks.1.attn.qkv.bias", lambda s, m: dataclasses.replace(s, lr_mult=1 / m), "too slowly"),
    (
        "table-lr-times-m",
        "y_embedder.embedding_table.weight",
        lambda s, m: dataclasses.replace(s, lr_mult=m),
        "too fast",
    ),
    ("no-readout-mult", "final_layer.linear.weight", lambda s, m: dataclasses.replace(s, forward_mult=1.0), "too fast"),
    (
        "constant-std",
        "blocks.1.attn.proj.weight",
        lambda s, m: dataclasses.replace(s, init_std=s.init_std * math.sqrt(m)),
        "too large",
    ),
    (
        "std-1/n",
        "blocks.0.attn.qkv.weight",
        lambda s, m: dataclasses.replace(s, init_std=s.init_std / math.sqrt(m)),
        "too small",
    ),
    (
        "wrong-role",
        "t_embedder.mlp.2.weight",
        lambda s, m: dataclasses.replace(s, role="input", lr_mult=1.0, init_std=s.init_std * math.sqrt(m)),
        "too large",
    ),
]


@pytest.mark.parametrize(("parameter", "fault", "words"), [f[1:] for f in _FAULTS], ids=[f[0] for f in _FAULTS])
def test_a_planted_fault_is_caught_and_named(parameter: str, fault: Fault, words: str) -> None:
    verdict = _check(tiny_mup_dit(64, _BASE), (32, 64, 128), build=plant_spec(parameter, fault))
    assert not verdict.passed
    assert verdict.broken == [parameter.rpartition(".")[0]]
    reasons = next(module.reasons for module in verdict.modules if module.verdict == "broken")
    assert any(words in reason for reason in reasons)


def test_nonzero_readout_may_shrink_at_the_start() -> None:
    """Constant std with the multiplier 1/m gives an output that starts as m^-1/2: that is muP, not a fault."""
    build = plant_spec("final_layer.linear.weight", lambda spec, m: dataclasses.replace(spec, init_std=0.1))
    verdict = _check(tiny_mup_dit(64, _BASE), (32, 64, 128), build=build)
    readout = next(module for module in verdict.modules if module.module == "final_layer.linear")
    assert verdict.passed and readout.first("gain") == pytest.approx(-0.5, abs=0.15)


def test_readings_measure_what_they_say() -> None:
    """One layer, moved by hand."""
    model = build_model(tiny_dit(width=16, num_classes=0))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0])
    recorder = Recorder(model, lambda: model(x, t), width=16, seed=0)
    recorder.record(0)
    layer = model.x_embedder.proj
    tokens = layer(x).detach()
    with torch.no_grad():
        layer.bias += 0.25
        layer.weight *= 3.0
    recorder.record(1)
    got = {(r.step, r.quantity): r.value for r in recorder.measurements if r.module == "x_embedder.proj"}
    size = float(x.abs().mean())
    assert got[0, "activation"] == pytest.approx(float(tokens.abs().mean()), rel=1e-5)
    assert got[0, "gain"] == pytest.approx(float(tokens.abs().mean()) / size, rel=1e-5)
    assert got[1, "update.bias"] == pytest.approx(0.25, rel=1e-4)
    assert got[1, "update.weight"] == pytest.approx(2 * float(tokens.abs().mean()) / size, rel=1e-4)
    assert got[1, "change"] == pytest.approx(float((2 * tokens + 0.25).abs().mean()), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_takes_an_activation_is_read_before_it() -> None:
    model = build_model(tiny_dit(width=16, num_classes=0))
    fc1 = model.blocks[0].mlp.fc1
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0])
    inputs: list[torch.Tensor] = []
    fc1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    recorder = Recorder(model, lambda: model(x, t), width=16, seed=0)
    recorder.record(0)
    (activation,) = (
        reading.value
        for reading in recorder.measurements
        if (reading.module, reading.quantity) == ("blocks.0.mlp.fc1", "activation")
    )
    before = nn.functional.linear(inputs[0], fc1.weight, fc1.bias).abs().mean()
    assert activation == pytest.approx(float(before.detach()), rel=1e-5)


def test_padded_tokens_are_not_read() -> None:
    model = build_model(tiny_mup_dit(64), TensorLayout(2, 0, sequence=True), device="meta")
    with pytest.raises(ValueError, match="sequence parallelism"):
        Recorder(model, lambda: torch.zeros(1), 64, 0)


def test_slopes() -> None:
    assert fit_slope([(32, 1.0), (64, 2.0), (128, 4.0)]) == pytest.approx(1.0)
    assert fit_slope([(32, 8.0), (64, 8.0), (128, 8.0)]) == pytest.approx(0.0)
    assert fit_slope([(32, 0.0), (64, 0.0)]) is None
    assert fit_slope([(32, 1.0), (64, 0.0)]) == -math.inf
    assert fit_slope([(32, 1.0), (64, math.nan)]) == math.inf


def test_a_model_that_blows_up_is_broken_and_written_as_json() -> None:
    measurements = [
        CoordMeasurement(w, 0, 1, "layer", "hidden", "update.weight", 1.0 if w < 128 else math.nan) for w in _WIDE
    ]
    verdict = judge(measurements)
    assert verdict.broken == ["layer"] and "not finite" in verdict.modules[0].reasons[0]
    assert verdict.to_json()["modules"][0]["slopes"] == {"update.weight": ["inf"]}


def test_widths_keep_head_dim_and_base_width() -> None:
    wide = at_width(tiny_mup_dit(64, 32), 128, "mup", (64, 128))
    assert (wide.num_heads, wide.head_channels, wide.base_width) == (8, 16, 32)
    assert at_width(tiny_dit(), 96, "mup", (48, 96)).base_width == 48
    assert at_width(tiny_mup_dit(64, 32), 128, "sp", (64, 128)).base_width is None
    with pytest.raises(UserError, match="multiples of 24"):
        at_width(tiny_dit(), 64, "sp", (48, 64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"widths": (64, 128)}, "three different widths"), ({"steps": 4}, "at least 5"), ({"seeds": 0}, "at least 1")],
)
def test_plans_that_could_not_tell_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CoordPlan(**{"widths": (32, 64, 128), **changes})
