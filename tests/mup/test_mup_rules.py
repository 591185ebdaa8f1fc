"""Roles and factors of every kind of parameter, and the numbers of the paper's DiT-XL/2-muP."""

from __future__ import annotations

import pytest

from helpers.models.tiny_dit import tiny_dit, tiny_mup_dit
from megadit.config import ModelConfig, OptimConfig
from megadit.config.schema.model import RoleHP, RoleHPs
from megadit.models import build_model
from megadit.mup import param_specs
from megadit.mup.groups import plan_groups
from megadit.mup.rules import eps_mult, wd_mult
from megadit.mup.spec import Dim
from megadit.mup.table import rows

_BLOCK = "blocks.0."


def test_xl_2_mup_numbers_of_the_paper() -> None:
    config = ModelConfig(width=1152, depth=28, heads=16, parametrization="mup", base_width=288)
    specs = param_specs(build_model(config, device="meta"))
    table = {row["name"]: row for row in rows(specs, OptimConfig(lr=2.0**-10))}
    assert table["blocks.27.attn.qkv.weight"]["lr"] == 2.0**-12
    assert table["blocks.27.attn.qkv.bias"]["lr"] == 2.0**-10
    assert table["x_embedder.proj.weight"]["lr"] == 2.0**-10
    assert table["final_layer.linear.weight"]["lr"] == 2.0**-10
    assert table["final_layer.linear.weight"]["forward_mult"] == 0.25
    assert {row["forward_mult"] for row in table.values() if row["role"] != "output"} == {1.0}
    assert table["blocks.0.mlp.fc2.weight"]["init_std"] == pytest.approx((4 * 1152) ** -0.5, rel=1e-12)
    assert table["blocks.0.attn.qkv.weight"]["init_std"] == pytest.approx(1152**-0.5, rel=1e-12)
    assert table["blocks.0.adaLN_modulation.1.weight"]["init_std"] == pytest.approx(1152**-0.5, rel=1e-12)
    assert table["x_embedder.proj.weight"]["init_std"] == 0.25
    assert table["y_embedder.embedding_table.weight"]["init_std"] == 1.0
    assert table["final_layer.linear.weight"]["init_std"] == 0.0
    assert list(table["x_embedder.proj.weight"]) == [
        "name", "role", "shape", "init_std", "forward_mult", "lr", "lr_mult", "wd", "eps", "clip_mult",
    ]  # fmt: skip


def test_roles_follow_declared_dims() -> None:
    specs = param_specs(build_model(tiny_mup_dit(64, qk_norm="rms"), device="meta"))
    assert {name: specs[name].role for name in specs if "blocks" not in name} == {
        "x_embedder.proj.weight": "input",
        "x_embedder.proj.bias": "vector",
        "t_embedder.mlp.0.weight": "input",
        "t_embedder.mlp.0.bias": "vector",
        "t_embedder.mlp.2.weight": "hidden",
        "t_embedder.mlp.2.bias": "vector",
        "y_embedder.embedding_table.weight": "input",
        "final_layer.linear.weight": "output",
        "final_layer.linear.bias": "finite",
        "final_layer.adaLN_modulation.1.weight": "hidden",
        "final_layer.adaLN_modulation.1.bias": "vector",
    }
    block = {name.removeprefix(_BLOCK): specs[name].role for name in specs if name.startswith(_BLOCK)}
    assert block.pop("attn.q_norm.weight") == block.pop("attn.k_norm.weight") == "finite"
    assert all(role == ("hidden" if name.endswith("weight") else "vector") for name, role in block.items())


def test_width_equal_to_a_finite_size_does_not_confuse_roles() -> None:
    """Width 32, 32 patch outputs, 256 = 8 x 32 features: only the declaration can tell them apart."""
    specs = param_specs(build_model(tiny_mup_dit(32, num_classes=31), device="meta"))
    assert specs["final_layer.linear.weight"].role == "output"
    assert specs["final_layer.linear.weight"].base_shape == (None, 32)
    assert specs["y_embedder.embedding_table.weight"].base_shape == (None, 32)
    assert specs["t_embedder.mlp.0.weight"].base_shape == (32, None)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_factors_under_mup(width: int) -> None:
    m = width / 32
    specs = param_specs(build_model(tiny_mup_dit(width, output_mult=4.0), device="meta"))
    qkv, readout = specs["blocks.0.attn.qkv.weight"], specs["final_layer.linear.weight"]
    assert (qkv.fan_in, qkv.fan_out, qkv.base_fan_in, qkv.base_fan_out) == (width, 3 * width, 32, 96)
    assert (qkv.lr_mult, qkv.wd_mult, qkv.forward_mult) == (1 / m, m, 1.0)
    assert (readout.lr_mult, readout.wd_mult, readout.forward_mult) == (1.0, 1.0, 4.0 / m)
    assert [wd_mult(qkv, mode) for mode in ("independent", "constant", "sqrt")] == [m, 1.0, m**0.5]
    assert [wd_mult(readout, mode) for mode in ("independent", "constant", "sqrt")] == [1.0, 1.0, 1.0]
    for name in ("blocks.0.attn.qkv.bias", "y_embedder.embedding_table.weight", "final_layer.linear.bias"):
        assert specs[name].wd_mult == wd_mult(specs[name]) == 0.0 and wd_mult(specs[name], wd_vectors=True) == 1.0
    for name, spec in specs.items():
        assert spec.eps_mult == 1.0
        assert eps_mult(spec, "scaled") == (1.0 if name == "final_layer.linear.bias" else 1 / m)


def test_sp_has_no_factors_whatever_the_base_width() -> None:
    for base_width in (None, 16):
        specs = param_specs(build_model(tiny_dit(base_width=base_width, output_mult=2.0), device="meta"))
        for name, spec in specs.items():
            assert spec.lr_mult == 1.0 and spec.wd_mult in (0.0, 1.0)
            assert spec.forward_mult == (2.0 if name == "final_layer.linear.weight" else 1.0)
            assert eps_mult(spec, "scaled") == 1.0 and wd_mult(spec, "sqrt", True) == 1.0


def test_original_init_is_the_official_one() -> None:
    specs = param_specs(build_model(ModelConfig(width=1152, depth=1, heads=16), device="meta"))
    xavier = {
        "x_embedder.proj.weight": (16, 1152),
        "blocks.0.attn.qkv.weight": (1152, 3456),
        "blocks.0.attn.proj.weight": (1152, 1152),
        "blocks.0.mlp.fc1.weight": (1152, 4608),
        "blocks.0.mlp.fc2.weight": (4608, 1152),
    }
    normal = {"t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"}
    for name, spec in specs.items():
        if name in xavier:
            assert spec.init_dist == "uniform"
            assert spec.init_std == pytest.approx((2 / sum(xavier[name])) ** 0.5, rel=1e-12)
        elif name in normal:
            assert (spec.init_dist, spec.init_std) == ("normal", 0.02)
        else:
            assert spec.init_std == 0.0 and spec.init_value == 0.0


def test_original_init_under_mup_is_taken_at_the_base_and_scaled() -> None:
    base = param_specs(build_model(tiny_mup_dit(32, init="original"), device="meta"))
    wide = param_specs(build_model(tiny_mup_dit(128, init="original"), device="meta"))
    for name, spec in wide.items():
        shrink = 0.5 if spec.role == "hidden" else 1.0
        assert spec.init_std == pytest.approx(base[name].init_std * shrink, rel=1e-12)


def test_adaln_init_is_an_option_of_its_own() -> None:
    name = "blocks.0.adaLN_modulation.1.weight"
    zero = param_specs(build_model(tiny_mup_dit(64, adaln_init="zero"), device="meta"))[name]
    drawn = param_specs(build_model(tiny_dit(width=64, adaln_init="fan_in"), device="meta"))[name]
    assert (zero.init_std, drawn.init_std) == (0.0, 0.125)


def test_role_hyperparameters_are_factors() -> None:
    hps = RoleHPs(
        input=RoleHP(mult=3.0, lr=0.5),
        hidden=RoleHP(mult=2.0, init_std=0.5, lr=4.0),
        vector=RoleHP(lr=8.0),
        finite=RoleHP(lr=16.0),
        output=RoleHP(lr=32.0),
    )
    plain = param_specs(build_model(tiny_mup_dit(64), device="meta"))
    specs = param_specs(build_model(tiny_mup_dit(64, role_hps=hps), device="meta"))
    lr = {"input": 0.5, "hidden": 4.0, "vector": 8.0, "finite": 16.0, "output": 32.0}
    mult = {"input": 3.0, "hidden": 2.0, "vector": 1.0, "finite": 1.0, "output": 1.0}
    for name, spec in specs.items():
        assert spec.lr_mult == plain[name].lr_mult * lr[spec.role]
        assert spec.forward_mult == plain[name].forward_mult * mult[spec.role]
        assert spec.init_std == plain[name].init_std * (0.5 if spec.role == "hidden" else 1.0)
        assert spec.wd_mult == plain[name].wd_mult


def test_groups_are_named_ordered_and_complete() -> None:
    specs = param_specs(build_model(tiny_mup_dit(64, qk_norm="rms"), device="meta"))
    plans = plan_groups(specs, OptimConfig(weight_decay=0.1))
    assert [plan.name for plan in plans] == ["input", "input/no_decay", "hidden", "vector", "output", "finite"]
    assert sorted(name for plan in plans for name in plan.param_names) == sorted(specs)
    reversed_specs = dict(reversed(specs.items()))
    assert [plan.name for plan in plan_groups(reversed_specs, OptimConfig(weight_decay=0.1))] == [p.name for p in plans]
    merged = plan_groups(specs, OptimConfig(weight_decay=0.1, wd_vectors=True))
    assert [plan.name for plan in merged] == ["input", "hidden", "vector", "output", "finite"]


def test_group_names_stay_unique_when_width_ratios_differ() -> None:
    """mlp_ratio 2.7 at 48 and 32 gives hidden sizes 129 and 86: another ratio than 48 / 32."""
    specs = param_specs(build_model(tiny_mup_dit(48, mlp_ratio=2.7), device="meta"))
    plans = plan_groups(specs, OptimConfig(eps_mode="scaled"))
    names = [plan.name for plan in plans]
    assert len(set(names)) == len(names)
    lr_mults = {name: plan.lr_mult for plan in plans for name in plan.param_names}
    assert lr_mults["blocks.0.mlp.fc2.weight"] == pytest.approx(86 / 129)
    assert lr_mults["blocks.0.mlp.fc1.weight"] == pytest.approx(32 / 48)


def test_dim_knows_its_ratio() -> None:
    assert (Dim(64, 32).mult, Dim(64).mult, Dim(64, 32).infinite, Dim(64).infinite) == (2.0, 1.0, True, False)
