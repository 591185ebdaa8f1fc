"""Every parameter held equal to the mup package (set_base_shapes, MuAdamW, MuReadout) at m = 1/2, 1, 2, 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_dit import randomize, tiny_config, tiny_mup_config
from megadit.config import OptimConfig
from megadit.models import StagedModel, build_model
from megadit.mup import attach_infshapes, param_groups, save_base_shapes

mup = pytest.importorskip("mup")

_BASE = 32
_WIDTHS = [16, 32, 64, 128]
_OPTIM = OptimConfig(lr=0.01, weight_decay=0.3, wd_vectors=True)


def _theirs(width: int, **options: Any) -> StagedModel:
    """An SP model whose infshapes the mup package finds by comparing a base and a delta model."""

    def sp(size: int) -> StagedModel:
        return build_model(tiny_config(width=size, heads=None, head_dim=16, init="fan_in", **options))

    model: StagedModel = mup.set_base_shapes(sp(width), sp(_BASE), delta=sp(3 * _BASE))
    return model


def _values(groups: list[dict[str, Any]], names: dict[torch.Tensor, str]) -> dict[str, tuple[float, float]]:
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "qk_norm": "rms"}], ids=str)
def test_lr_wd_and_shapes_equal_the_package(width: int, options: dict[str, Any]) -> None:
    theirs = _theirs(width, **options)
    ours = build_model(tiny_mup_config(width, _BASE, **options))
    optimizer = mup.MuAdamW(theirs.parameters(), lr=_OPTIM.lr, weight_decay=_OPTIM.weight_decay)
    expected = _values(optimizer.param_groups, {p: name for name, p in theirs.named_parameters()})
    got = _values(param_groups(ours, _OPTIM), {p: name for name, p in ours.named_parameters()})
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert values == pytest.approx(expected[name], rel=1e-12), name

    attach_infshapes(ours)
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert param.infshape == other.infshape and param.infshape.width_mult() == other.infshape.width_mult(), name


@pytest.mark.parametrize("width", _WIDTHS)
def test_readout_equals_mu_readout(width: int) -> None:
    ours = build_model(tiny_mup_config(width, _BASE, output_mult=2.5))
    randomize(ours)
    attach_infshapes(ours)
    layer = ours.final_layer.linear
    readout = mup.MuReadout(width, layer.out_features, output_mult=2.5)
    readout.weight, readout.bias = layer.weight, layer.bias
    x = torch.randn(5, width)
    torch.testing.assert_close(layer(x), readout(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", _WIDTHS)
def test_base_shape_file_is_what_the_package_reads(width: int, tmp_path: Path) -> None:
    ours = build_model(tiny_mup_config(width, _BASE, qk_norm="rms"))
    path = tmp_path / "dit.bsh"
    save_base_shapes(ours, path)
    theirs = _theirs(width, qk_norm="rms")
    expected = {name: param.infshape for name, param in theirs.named_parameters()}
    mup.set_base_shapes(ours, str(path))
    assert {name: param.infshape for name, param in ours.named_parameters()} == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["dit.bsh"]


def test_mu_adamw_trains_our_model_as_our_groups_do() -> None:
    """One optimizer step from the package's groups and one from ours end in the same weights."""
    results = []
    for package in (True, False):
        model = build_model(tiny_mup_config(64, _BASE))
        randomize(model)
        attach_infshapes(model)
        optimizer = (
            mup.MuAdamW(model.parameters(), lr=_OPTIM.lr, weight_decay=_OPTIM.weight_decay)
            if package
            else torch.optim.AdamW(param_groups(model, _OPTIM))
        )
        for index, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 0.5 + index)
        optimizer.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-6, atol=1e-7)
