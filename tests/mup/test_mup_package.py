"""Every parameter held equal to the mup package (set_base_shapes, MuAdamW, MuReadout) at m = 1/2, 1, 2, 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models.tiny_dit import tiny_dit, tiny_mup_dit
from helpers.models.weights import randomize
from helpers.mup_checks import (
    BASE,
    assert_equals_the_package,
    assert_readout_is_mu_readout,
    assert_trained_as_by_mu_adamw,
    infshapes,
    package_model,
)
from megadit.models import StagedModel, build_model
from megadit.mup.interop import save_base_shapes

mup = pytest.importorskip("mup")

_WIDTHS = [16, 32, 64, 128]


def _theirs(width: int, **options: Any) -> StagedModel:
    """An SP model whose infshapes the mup package finds by comparing a base and a delta model."""

    def sp(size: int) -> StagedModel:
        return build_model(tiny_dit(width=size, heads=None, head_dim=16, init="fan_in", **options))

    return package_model(sp, width)


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "qk_norm": "rms"}], ids=str)
def test_lr_wd_and_shapes_equal_the_package(width: int, options: dict[str, Any]) -> None:
    assert_equals_the_package(build_model(tiny_mup_dit(width, BASE, **options)), _theirs(width, **options))


@pytest.mark.parametrize("width", _WIDTHS)
def test_readout_equals_mu_readout(width: int) -> None:
    ours = build_model(tiny_mup_dit(width, BASE, output_mult=2.5))
    randomize(ours)
    assert_readout_is_mu_readout(ours, ours.final_layer.linear, 2.5)


@pytest.mark.parametrize("width", _WIDTHS)
def test_base_shape_file_is_what_the_package_reads(width: int, tmp_path: Path) -> None:
    ours = build_model(tiny_mup_dit(width, BASE, qk_norm="rms"))
    path = tmp_path / "dit.bsh"
    save_base_shapes(ours, path)
    theirs = _theirs(width, qk_norm="rms")
    expected = infshapes(theirs)
    mup.set_base_shapes(ours, str(path))
    assert infshapes(ours) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["dit.bsh"]


def test_mu_adamw_trains_our_model_as_our_groups_do() -> None:
    """One optimizer step from the package's groups and one from ours end in the same weights."""

    def drawn() -> StagedModel:
        model = build_model(tiny_mup_dit(64, BASE))
        randomize(model)
        return model

    def backward(model: StagedModel) -> None:
        for index, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 0.5 + index)

    assert_trained_as_by_mu_adamw(drawn, backward, rtol=1e-6, atol=1e-7)
