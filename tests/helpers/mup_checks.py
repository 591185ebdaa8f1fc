"""What the muP tests of all families share: the mup package's view of a model, muP at m = 1, the coordinate check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megadit.config import ModelConfig, ObjectiveConfig, OptimConfig
from megadit.diffusion import build_objective
from megadit.models import StagedModel, build_model
from megadit.mup import ParamSpec
from megadit.mup.coord_check.measure import Build, TrainingObjective, measure_coordinates
from megadit.mup.coord_check.plan import CoordPlan
from megadit.mup.coord_check.verdict import CoordVerdict, judge
from megadit.mup.example import example_conditioning
from megadit.mup.groups import param_groups
from megadit.mup.init import init_parameters
from megadit.mup.interop import attach_infshapes

Fault = Callable[[ParamSpec, float], ParamSpec]

BASE = 32
OPTIM = OptimConfig(lr=0.01, weight_decay=0.3, wd_vectors=True)
# Of one model: muP at m = 1, and SP.
AT_THE_BASE = ({"parametrization": "mup", "base_width": 48}, {"parametrization": "sp"})


def package_model(sp: Callable[[int], StagedModel], width: int) -> StagedModel:
    """The SP model of a width whose infshapes the mup package finds by comparing a base and a delta model."""
    mup = pytest.importorskip("mup")
    model: StagedModel = mup.set_base_shapes(sp(width), sp(BASE), delta=sp(3 * BASE))
    return model


def assert_equals_the_package(ours: StagedModel, theirs: StagedModel) -> None:
    """Learning rate, weight decay, infshape and width multiplier of every parameter are those of MuAdamW."""
    mup = pytest.importorskip("mup")
    optimizer = mup.MuAdamW(theirs.parameters(), lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    expected, got = _rates(optimizer.param_groups, theirs), _rates(param_groups(ours, OPTIM), ours)
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert values == pytest.approx(expected[name], rel=1e-12), name
    attach_infshapes(ours)
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert param.infshape == other.infshape and param.infshape.width_mult() == other.infshape.width_mult(), name


def _rates(groups: Sequence[dict[str, Any]], model: StagedModel) -> dict[str, tuple[float, float]]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def infshapes(model: StagedModel) -> dict[str, Any]:
    """The infshape of every parameter by its name."""
    return {name: param.infshape for name, param in model.named_parameters()}


def assert_trained_as_by_mu_adamw(
    build: Callable[[], StagedModel], backward: Callable[[StagedModel], None], rtol: float, atol: float
) -> None:
    """One step of the package's optimizer and one of AdamW over our groups end in the same weights."""
    mup = pytest.importorskip("mup")
    results = []
    for package in (True, False):
        model = build()
        attach_infshapes(model)
        backward(model)
        optimizer = (
            mup.MuAdamW(model.parameters(), lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
            if package
            else torch.optim.AdamW(param_groups(model, OPTIM))
        )
        optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=rtol, atol=atol)


def assert_readout_is_mu_readout(ours: StagedModel, layer: Any, output_mult: float) -> None:
    """The layer, one of ``ours``, gives what the package's MuReadout with its weights gives."""
    mup = pytest.importorskip("mup")
    attach_infshapes(ours)
    readout = mup.MuReadout(layer.in_features, layer.out_features, output_mult=output_mult)
    readout.weight, readout.bias = layer.weight, layer.bias
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), readout(x), rtol=1e-5, atol=1e-6)


def assert_mup_at_the_base_is_sp(
    make: Callable[..., ModelConfig], inputs: Callable[[ModelConfig], Sequence[Any]]
) -> None:
    """Three steps of AdamW end in the same bits. ``make`` takes keys of AT_THE_BASE, ``inputs`` gives x, t and cond."""
    results: list[list[Tensor]] = []
    for changes in AT_THE_BASE:
        config = make(**changes)
        model = build_model(config, seed=4)
        x, t, cond = inputs(config)
        optimizer = torch.optim.AdamW(param_groups(model, OPTIM))
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x, t, cond) - 1).square().mean()
            loss.backward()
            optimizer.step()
        results.append([loss, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def coordinate_verdict(
    model: ModelConfig,
    parametrization: str | None = "mup",
    widths: tuple[int, ...] = (32, 64, 128),
    *,
    seeds: int = 1,
    batch: int = 16,
    optim: OptimConfig | None = None,
    build: Build = lambda config, seed: build_model(config, seed=seed),
    objective: TrainingObjective | None = None,
    alignment: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> CoordVerdict:
    """The coordinate check of five steps; by default DDPM where the model learns a variance, else flow matching."""
    if objective is None:
        objective = build_objective(
            ObjectiveConfig(kind="ddpm" if model.learn_sigma else "flow"),
            learn_sigma=model.learn_sigma,
            num_classes=model.num_classes,
            null=None if model.text is None else example_conditioning(model, [0]),
        )
    plan = CoordPlan(widths, steps=5, seeds=seeds, batch=batch)
    measurements = measure_coordinates(
        model,
        optim or OptimConfig(lr=2.0**-9),
        plan,
        build=build,
        objective=objective,
        parametrization=parametrization,
        alignment=alignment,
    )
    return judge(measurements)


def plant_spec(parameter: str, fault: Fault) -> Build:
    """A builder whose model has one wrong spec; ``fault`` gets the right one and m."""

    def build(config: ModelConfig, seed: int) -> StagedModel:
        model = build_model(config, seed=seed)
        layer, _, local = parameter.rpartition(".")
        specs: dict[str, ParamSpec] = model.get_submodule(layer).param_specs  # type: ignore[assignment]
        specs[local] = fault(specs[local], config.width_mult)
        init_parameters(model, seed)
        return model

    return build
