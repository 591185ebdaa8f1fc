"""Every parameter starts from what the originals, and the paper's authors through the mup package, draw it from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from helpers.foreign import official_init as official
from helpers.foreign.official_init import InitialDistribution, initial_distributions
from helpers.models.tiny_pixart import tiny_mup_pixart
from megadit.config import ModelConfig, load, load_config, preset
from megadit.errors import UserError
from megadit.models import build_model
from megadit.mup import param_specs

WIDTHS = (288, 1152)
BASE = 288


def ours(family: str, width: int, **changes: Any) -> dict[str, InitialDistribution]:
    """What megadit's parameters start from: two blocks, or one where the originals' shapes here have one."""
    values: dict[str, Any] = {"family": family, "width": width, "depth": 1, "head_dim": 72}
    if family in ("pixart", "mmdit"):
        values |= {"num_classes": 0, "text": {"dim": 4096}}
    specs = param_specs(build_model(ModelConfig(**{**values, **changes}), device="meta"))
    return {
        name: InitialDistribution(spec.init_dist, spec.init_std)
        if spec.init_std
        else InitialDistribution("constant", spec.init_value)
        for name, spec in specs.items()
    }


def assert_same(starts: dict[str, InitialDistribution], expected: dict[str, InitialDistribution]) -> None:
    assert set(starts) == set(expected)
    for name, start in expected.items():
        assert (starts[name].kind, starts[name].value) == (start.kind, pytest.approx(start.value, rel=1e-12)), name


def under_mup(shapes: Any, width: int, draw: Any) -> dict[str, InitialDistribution]:
    """The start of a muP model of base width 288 whose infshapes the package finds; ``draw`` takes the model."""
    mup = pytest.importorskip("mup")

    def build() -> nn.Module:
        model = shapes(width, mup.MuReadout)
        if draw is official.authors_dit:
            draw(model)  # its layers initialise themselves, before the package sees them
        base, delta = shapes(BASE, mup.MuReadout), shapes(BASE + 72, mup.MuReadout)
        mup.set_base_shapes(model, base, delta=delta)
        return model

    return initial_distributions(build, None if draw is official.authors_dit else lambda model: draw(model, mup.init))


@pytest.mark.parametrize("width", WIDTHS)
def test_pixart_mup_starts_as_the_authors_does(width: int) -> None:
    starts = ours("pixart", width, parametrization="mup", base_width=BASE, init="authors")
    assert_same(starts, under_mup(official.pixart_shapes, width, official.pixart))


@pytest.mark.parametrize("width", WIDTHS)
def test_dit_mup_starts_as_the_authors_does(width: int) -> None:
    starts = ours("dit", width, parametrization="mup", base_width=BASE)
    assert_same(starts, under_mup(official.dit_shapes, width, official.authors_dit))


SP: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dit": (official.dit_shapes, official.official_dit, {}),
    "pixart": (official.pixart_shapes, official.pixart, {}),
    "uvit": (
        official.uvit_shapes,
        official.official_uvit,
        {"depth": 2, "mlp_time_embed": True, "qkv_bias": False, "learn_sigma": False},
    ),
    "mmdit": (
        official.mmdit_shapes,
        official.mmdit_as_dit,
        {"depth": 2, "qk_norm": "rms", "learn_sigma": False, "text": {"dim": 4096, "pooled_dim": 768}},
    ),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", SP)
def test_sp_starts_as_the_original_does(family: str, width: int) -> None:
    shapes, draw, changes = SP[family]
    assert_same(ours(family, width, **changes), initial_distributions(lambda: shapes(width), draw))


def test_the_papers_files_have_the_authors_numbers() -> None:
    """What the two files give, to three digits: the values at width 288 and 1152."""
    numbers = {
        "x_embedder.proj.weight": (0.0414, 0.0414),
        "t_embedder.mlp.0.weight": (0.0200, 0.0200),
        "t_embedder.mlp.2.weight": (0.0200, 0.0100),
        "t_block.1.weight": (0.0200, 0.0100),
        "y_embedder.y_proj.fc1.weight": (0.0200, 0.0200),
        "y_embedder.y_proj.fc2.weight": (0.0200, 0.0100),
        "blocks.0.attn.qkv.weight": (0.0417, 0.0208),
        "blocks.0.attn.proj.weight": (0.0589, 0.0295),
        "blocks.0.cross_attn.q_linear.weight": (0.0589, 0.0295),
        "blocks.0.cross_attn.kv_linear.weight": (0.0481, 0.0241),
        "blocks.0.cross_attn.proj.weight": (0.0, 0.0),
        "blocks.0.mlp.fc1.weight": (0.0373, 0.0186),
        "blocks.0.mlp.fc2.weight": (0.0373, 0.0186),
        "blocks.0.scale_shift_table": (0.0200, 0.0200),
        "final_layer.scale_shift_table": (0.0200, 0.0200),
    }
    for position, name in enumerate(("proxy-mup", "target-mup")):
        specs = param_specs(build_model(load_config(f"pixart/{name}.yaml").model, device="meta"))
        for parameter, stds in numbers.items():
            assert round(specs[parameter].init_std, 4) == stds[position], (name, parameter)


def test_the_gates_start_small() -> None:
    """Their rms over timesteps; by fan-in it is ten times as large, at every width."""
    rms = {}
    for init in ("authors", "fan_in"):
        changes = {"depth": 1, "init": init, "text": {"dim": 8}}
        model = build_model(ModelConfig(**{**preset("pixart-proxy-mup").model_dump(), **changes}))
        with torch.no_grad():
            t0 = model.t_block(model.t_embedder(torch.linspace(0, 999, 100))).unflatten(1, (6, -1))
            gates = (t0 + model.blocks[0].scale_shift_table)[:, [2, 5]]
        rms[init] = gates.square().mean().sqrt().item()
    assert rms == {"authors": pytest.approx(0.021, rel=0.05), "fan_in": pytest.approx(0.21, rel=0.1)}


def test_the_start_is_the_presets_until_something_else_is_said() -> None:
    """``authors`` comes with the muP presets, goes with them, and gives way to what a file or an override says."""
    file = "pixart/proxy-mup.yaml"
    assert load_config(file).model.init == "authors"
    assert load_config(file, ["model.init=fan_in"]).model.init == "fan_in"
    assert load_config(file, ["model.preset=pixart-xl-2"]).model.init == "auto"
    assert load_config(file, ["model.preset=pixart-xl-2-mup"]).model.init == "authors"
    assert load_config("pixart/baseline.yaml").model.init == "auto"
    assert load_config("pixart/baseline.yaml", ["model.preset=pixart-proxy-mup"]).model.init == "authors"
    config = load_config("pixart/baseline.yaml", ["model.preset=pixart-proxy-mup", "model.init=original"])
    assert config.model.init == "original"


def test_a_resolved_configuration_keeps_the_start_it_names(tmp_path: Any) -> None:
    """``auto`` under muP is still fan_in: a run of before goes on as it was."""
    from megadit.config import save_config

    config = load_config("pixart/proxy-mup.yaml", ["model.init=auto"])
    save_config(config, tmp_path / "config.yaml")
    again = load(tmp_path / "config.yaml").config.model
    assert (again.init, again.init_scheme) == ("auto", "fan_in")


@pytest.mark.parametrize("file", ["dit/proxy-288-mup.yaml", "uvit/l-2-mup.yaml", "mmdit/proxy-mup.yaml"])
def test_other_families_have_no_such_start(file: str) -> None:
    with pytest.raises(UserError, match=r"^model\.init: authors is the start of the paper's PixArt-muP, not of "):
        load_config(file, ["model.init=authors"])


def test_options_beside_it() -> None:
    """A factor per role and a start of the modulation of one's own."""
    plain = param_specs(build_model(tiny_mup_pixart(64, init="authors"), device="meta"))
    options = {"adaln_init": "zero", "role_hps": {"hidden": {"init_std": 0.5}}}
    changed = param_specs(build_model(tiny_mup_pixart(64, init="authors", **options), device="meta"))
    for name, spec in changed.items():
        factor = 0.5 if spec.role == "hidden" else 1.0
        expected = 0.0 if name == "t_block.1.weight" else factor * plain[name].init_std
        assert math.isclose(spec.init_std, expected, rel_tol=1e-12), name
