"""PixArt under muP: its table of roles and factors, equality with the mup package, and the coordinate check."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart, tiny_pixart
from helpers.models.weights import randomize
from helpers.mup_checks import (
    BASE,
    assert_equals_the_package,
    assert_mup_at_the_base_is_sp,
    assert_trained_as_by_mu_adamw,
    coordinate_verdict,
    infshapes,
    package_model,
)
from megadit.config import preset
from megadit.models import StagedModel, build_model
from megadit.mup import param_specs
from megadit.mup.interop import save_base_shapes

_TEXT = {"dim": 64, "max_length": 5}  # as wide as one of the widths, as 4096 may be
_OPTIONS: list[dict[str, Any]] = [{}, {"mlp": "swiglu", "qk_norm": "rms"}]


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_roles_and_factors(width: int) -> None:
    m = width / BASE
    specs = param_specs(build_model(tiny_mup_pixart(width, text=_TEXT, output_mult=2.0), device="meta"))
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
        changes = {"width": width, "head_dim": 32, "depth": 1, "init": "fan_in"}
        config = preset("pixart-proxy-mup").model_copy(update=changes)
        spec = param_specs(build_model(config, device="meta"))["y_embedder.y_proj.fc1.weight"]
        assert (spec.role, spec.shape, spec.base_shape, spec.lr_mult) == ("input", (width, 4096), (288, None), 1.0)
        assert spec.init_std == 1 / 64


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("options", _OPTIONS, ids=str)
def test_lr_wd_and_shapes_equal_the_package(width: int, options: dict[str, Any], tmp_path: Path) -> None:
    def sp(size: int) -> StagedModel:
        return build_model(tiny_pixart(width=size, heads=None, head_dim=16, init="fan_in", text=_TEXT, **options))

    theirs = package_model(sp, width)
    shapes = infshapes(theirs)
    ours = build_model(tiny_mup_pixart(width, BASE, text=_TEXT, **options))
    assert_equals_the_package(ours, theirs)
    save_base_shapes(ours, tmp_path / "pixart.bsh")
    pytest.importorskip("mup").set_base_shapes(ours, str(tmp_path / "pixart.bsh"))
    assert infshapes(ours) == shapes


def test_mu_adamw_trains_our_model_as_our_groups_do() -> None:
    config = tiny_mup_pixart(64, BASE)

    def drawn() -> StagedModel:
        model = build_model(config)
        randomize(model)
        return model

    def backward(model: StagedModel) -> None:
        model(*pixart_inputs(config)).square().mean().backward()

    assert_trained_as_by_mu_adamw(drawn, backward, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["original", "fan_in", "authors"])
def test_mup_at_the_base_width_is_sp_bit_for_bit(init: str) -> None:
    assert_mup_at_the_base_is_sp(partial(tiny_pixart, init=init, output_mult=2.0), pixart_inputs)


@pytest.mark.parametrize("init", ["fan_in", "original", "authors"])
def test_coordinate_check_passes_mup_and_fails_sp(init: str) -> None:
    model = tiny_mup_pixart(64, 64, init=init)
    mup = coordinate_verdict(model)
    assert mup.passed, [(m.module, m.reasons, m.effects) for m in mup.modules if m.verdict != "ok"]
    tables = [m for m in mup.modules if "update.scale_shift_table" in m.slopes]
    assert [m.module for m in tables] == ["blocks.0", "blocks.1", "final_layer"]
    assert all(abs(m.growth("update.scale_shift_table") or 0) < 0.15 for m in tables)

    sp = coordinate_verdict(model, "sp")
    hidden = {m.module for m in sp.modules if m.role in ("hidden", "output") and m.module != "output"}
    assert not sp.passed and len(hidden & set(sp.broken)) >= 0.9 * len(hidden), hidden - set(sp.broken)
