"""PixArt under muP: its table of roles and factors, equality with the mup package, and the coordinate check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers.tiny_dit import randomize
from helpers.tiny_pixart import pixart_inputs, tiny_pixart, tiny_pixart_mup
from megadit.config import ObjectiveConfig, OptimConfig, preset
from megadit.diffusion import build_objective
from megadit.models import StagedModel, build_model
from megadit.mup import attach_infshapes, param_groups, param_specs, save_base_shapes
from megadit.mup.coord_check import CoordPlan, coordinate_readings
from megadit.mup.coord_verdict import CoordVerdict, judge
from megadit.mup.example import example_conditioning

_BASE = 32
_OPTIM = OptimConfig(lr=0.01, weight_decay=0.3, wd_vectors=True)
_TEXT = {"dim": 64, "max_length": 5}  # as wide as one of the widths, as 4096 may be
_OPTIONS: list[dict[str, Any]] = [{}, {"mlp": "swiglu", "qk_norm": "rms"}]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_roles_and_factors(width: int) -> None:
    m = width / _BASE
    specs = param_specs(build_model(tiny_pixart_mup(width, text=_TEXT, output_mult=2.0), device="meta"))
    table = {  # role, LR, weight decay, forward multiplier, init std, and that of one block for all
        "x_embedder.proj": ("input", 1.0, 1.0, 1.0, 0.25),
        "t_embedder.mlp.0": ("input", 1.0, 1.0, 1.0, 1 / 16),
        "t_embedder.mlp.2": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "t_block.1": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "y_embedder.y_proj.fc1": ("input", 1.0, 1.0, 1.0, 1 / 8),
        "y_embedder.y_proj.fc2": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "final_layer.linear": ("output", 1.0, 1.0, 2.0 / m, 0.0),
        "attn.qkv": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "attn.proj": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "cross_attn.q_linear": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "cross_attn.kv_linear": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "cross_attn.proj": ("hidden", 1 / m, m, 1.0, 0.0),
        "mlp.fc1": ("hidden", 1 / m, m, 1.0, width**-0.5),
        "mlp.fc2": ("hidden", 1 / m, m, 1.0, (4 * width) ** -0.5),
    }
    for name, spec in specs.items():
        layer, _, kind = name.rpartition(".")
        layer = layer.split(".", 2)[-1] if layer.startswith("blocks.") else layer
        values = (spec.role, spec.lr_mult, spec.wd_mult, spec.forward_mult, spec.init_std)
        if kind == "scale_shift_table":
            assert values == ("vector", 1.0, 0.0, 1.0, 0.02), name
        elif kind == "bias":
            role = "finite" if layer == "final_layer.linear" else "vector"
            assert values == (role, 1.0, 0.0, 1.0, 0.0), name
        else:
            assert values[0] == table[layer][0] and values[1:] == pytest.approx(table[layer][1:], rel=1e-12), name


def test_text_projection_of_the_proxy_and_of_a_width_of_4096() -> None:
    """4096 text channels stay a finite dimension, also where the width is 4096 or grows past it."""
    for width in (288, 4096, 8192):
        changes = {"width": width, "head_dim": 32, "depth": 1}
        config = preset("pixart-proxy-mup").model_copy(update=changes)
        spec = param_specs(build_model(config, device="meta"))["y_embedder.y_proj.fc1.weight"]
        assert (spec.role, spec.shape, spec.base_shape, spec.lr_mult) == ("input", (width, 4096), (288, None), 1.0)
        assert spec.init_std == 1 / 64


def _theirs(mup: Any, width: int, **options: Any) -> StagedModel:
    """An SP model whose infshapes the mup package finds by comparing a base and a delta model."""

    def sp(size: int) -> StagedModel:
        return build_model(tiny_pixart(width=size, heads=None, head_dim=16, init="fan_in", text=_TEXT, **options))

    model: StagedModel = mup.set_base_shapes(sp(width), sp(_BASE), delta=sp(3 * _BASE))
    return model


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("options", _OPTIONS, ids=str)
def test_lr_wd_and_shapes_equal_the_package(width: int, options: dict[str, Any], tmp_path: Any) -> None:
    mup = pytest.importorskip("mup")
    theirs = _theirs(mup, width, **options)
    ours = build_model(tiny_pixart_mup(width, _BASE, text=_TEXT, **options))
    optimizer = mup.MuAdamW(theirs.parameters(), lr=_OPTIM.lr, weight_decay=_OPTIM.weight_decay)

    def values(groups: Any, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
        names = {p: name for name, p in model.named_parameters()}
        return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    expected, got = values(optimizer.param_groups, theirs), values(param_groups(ours, _OPTIM), ours)
    assert got.keys() == expected.keys()
    for name, pair in got.items():
        assert pair == pytest.approx(expected[name], rel=1e-12), name
    shapes = {name: param.infshape for name, param in theirs.named_parameters()}
    attach_infshapes(ours)
    assert {name: param.infshape for name, param in ours.named_parameters()} == shapes
    save_base_shapes(ours, tmp_path / "pixart.bsh")
    mup.set_base_shapes(ours, str(tmp_path / "pixart.bsh"))
    assert {name: param.infshape for name, param in ours.named_parameters()} == shapes


def test_mu_adamw_trains_our_model_as_our_groups_do() -> None:
    mup = pytest.importorskip("mup")
    results = []
    for package in (True, False):
        config = tiny_pixart_mup(64, _BASE)
        model = build_model(config)
        randomize(model)
        attach_infshapes(model)
        optimizer = (
            mup.MuAdamW(model.parameters(), lr=_OPTIM.lr, weight_decay=_OPTIM.weight_decay)
            if package
            else torch.optim.AdamW(param_groups(model, _OPTIM))
        )
        model(*pixart_inputs(config)).square().mean().backward()
        optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


def test_mup_at_the_base_width_is_sp_bit_for_bit() -> None:
    for init in ("original", "fan_in"):
        results = []
        for changes in ({"parametrization": "mup", "base_width": 48}, {"parametrization": "sp"}):
            config = tiny_pixart(init=init, output_mult=2.0, **changes)
            model = build_model(config, seed=4)
            x, t, cond = pixart_inputs(config)
            optimizer = torch.optim.AdamW(param_groups(model, _OPTIM))
            for _ in range(3):
                optimizer.zero_grad()
                (model(x, t, cond) - 1).square().mean().backward()
                optimizer.step()
            results.append([param.detach() for param in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _check(parametrization: str, init: str) -> CoordVerdict:
    model = tiny_pixart_mup(64, 64, init=init)
    objective = build_objective(
        ObjectiveConfig(), learn_sigma=True, num_classes=0, null=example_conditioning(model, [0])
    )
    readings = coordinate_readings(
        model,
        OptimConfig(lr=2.0**-9),
        CoordPlan((32, 64, 128), steps=5, seeds=1, batch=16),
        build=lambda config, seed: build_model(config, seed=seed),
        objective=objective,
        parametrization=parametrization,
    )
    return judge(readings)


@pytest.mark.parametrize("init", ["fan_in", "original"])
def test_coordinate_check_passes_mup_and_fails_sp(init: str) -> None:
    mup = _check("mup", init)
    assert mup.passed, [(m.module, m.reasons, m.effects) for m in mup.modules if m.verdict != "ok"]
    tables = [m for m in mup.modules if "update.scale_shift_table" in m.slopes]
    assert [m.module for m in tables] == ["blocks.0", "blocks.1", "final_layer"]
    assert all(abs(m.growth("update.scale_shift_table") or 0) < 0.15 for m in tables)

    sp = _check("sp", init)
    hidden = {m.module for m in sp.modules if m.role in ("hidden", "output") and m.module != "output"}
    assert not sp.passed and len(hidden & set(sp.broken)) >= 0.9 * len(hidden), hidden - set(sp.broken)
