"""The table of U-ViT: roles, original init, equality with the mup package, coordinate check of every kind."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from helpers.models.tiny_uvit import KINDS, tiny_mup_uvit, tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from helpers.mup_checks import (
    BASE,
    assert_equals_the_package,
    assert_mup_at_the_base_is_sp,
    assert_readout_is_mu_readout,
    coordinate_verdict,
    package_model,
)
from megadit.config import ModelConfig, ObjectiveConfig
from megadit.diffusion import build_objective
from megadit.models import StagedModel, build_model
from megadit.mup import param_specs
from megadit.mup.coord_check.verdict import CoordVerdict
from megadit.mup.rules import wd_mult

_OPTIONS = {"mlp_time_embed": True, "mlp": "swiglu", "qk_norm": "rms", "qkv_bias": True}


def _meta_specs(config: ModelConfig) -> dict[str, Any]:
    return param_specs(build_model(config, device="meta"))


def test_roles_follow_declared_dims() -> None:
    text = _meta_specs(tiny_mup_uvit(64, kind="text", mlp_time_embed=True, qk_norm="rms"))
    labels = _meta_specs(tiny_mup_uvit(64))
    assert labels["label_emb.weight"].role == "input"
    assert {name: spec.role for name, spec in text.items() if "blocks" not in name and "mid" not in name} == {
        "patch_embed.proj.weight": "input",
        "patch_embed.proj.bias": "vector",
        "time_embed.0.weight": "hidden",
        "time_embed.0.bias": "vector",
        "time_embed.2.weight": "hidden",
        "time_embed.2.bias": "vector",
        "context_embed.weight": "input",
        "context_embed.bias": "vector",
        "pos_embed.weight": "input",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "decoder_pred.weight": "output",
        "decoder_pred.bias": "finite",
        "final_layer.weight": "finite",
        "final_layer.bias": "finite",
    }
    block = {name: spec for name, spec in text.items() if name.startswith("out_blocks.1.")}
    gains = {"out_blocks.1.attn.q_norm.weight", "out_blocks.1.attn.k_norm.weight"}
    assert {name for name, spec in block.items() if spec.role == "finite"} == gains
    hidden = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear"}
    assert {n for n, spec in block.items() if spec.role == "hidden"} == {f"out_blocks.1.{n}.weight" for n in hidden}
    skip = block["out_blocks.1.skip_linear.weight"]
    assert (skip.fan_in, skip.base_fan_in, skip.fan_out, skip.lr_mult, skip.wd_mult) == (128, 64, 64, 0.5, 2.0)
    assert skip.init_std == pytest.approx(128**-0.5)
    assert (text["time_embed.2.weight"].fan_in, text["decoder_pred.weight"].forward_mult) == (256, 0.5)
    for name in ("final_layer.weight", "pos_embed.weight", "norm.weight"):
        assert wd_mult(text[name]) == 0.0 and wd_mult(text[name], wd_vectors=True) == 1.0
    assert text["decoder_pred.weight"].init_std == 0.0


def test_original_init_is_the_official_one() -> None:
    """N(0, .02) on linears and positions, torch's own start of the label table and of all of the convolutions."""
    for kind in KINDS:
        for name, spec in _meta_specs(tiny_uvit(kind, width=1024, heads=16, depth=2, mlp_time_embed=True)).items():
            if name.startswith(("patch_embed.", "final_layer.")):
                bound = {"patch_embed": 4 * 2 * 2, "final_layer": 4 * 3 * 3}[name.split(".")[0]] ** -0.5
                assert spec.init_dist == "uniform" and spec.init_std == pytest.approx(bound / 3**0.5)
            elif name == "label_emb.weight":
                assert (spec.init_dist, spec.init_std) == ("normal", 1.0)
            elif len(spec.shape) > 1:
                assert (spec.init_dist, spec.init_std) == ("normal", 0.02), name
            else:
                gain = name.endswith("weight")
                assert (spec.init_std, spec.init_value) == (0.0, 1.0 if gain else 0.0), name


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_lr_wd_and_shapes_equal_the_package(width: int, kind: str) -> None:
    def sp(size: int) -> StagedModel:
        return build_model(tiny_uvit(kind, width=size, heads=None, head_dim=16, init="fan_in", **_OPTIONS))

    assert_equals_the_package(build_model(tiny_mup_uvit(width, BASE, kind, **_OPTIONS)), package_model(sp, width))


@pytest.mark.parametrize("width", [16, 64])
def test_readout_equals_mu_readout(width: int) -> None:
    ours = build_model(tiny_mup_uvit(width, BASE, output_mult=2.5))
    randomize(ours)
    assert_readout_is_mu_readout(ours, ours.decoder_pred, 2.5)


def test_mup_at_the_base_width_is_sp_bit_for_bit() -> None:
    assert_mup_at_the_base_is_sp(partial(tiny_uvit, "text", init="original", output_mult=2.0), uvit_inputs)


def _check(model: ModelConfig, parametrization: str, seeds: int) -> CoordVerdict:
    objective = build_objective(ObjectiveConfig(label_dropout=0.0), learn_sigma=False, num_classes=model.num_classes)
    widths = (32, 64, 128, 256) if parametrization == "mup" else (32, 64, 128)
    return coordinate_verdict(model, parametrization, widths, seeds=seeds, objective=objective)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("class", {}), ("text", {"mlp_time_embed": True, "qk_norm": "rms"}), ("none", {"init": "original"})],
    ids=["class", "text", "none"],
)
def test_mup_passes_and_sp_fails(kind: str, options: dict[str, Any]) -> None:
    config = tiny_mup_uvit(64, 64, kind, depth=2, **options)
    mup = _check(config, "mup", seeds=2)
    assert mup.passed, [(m.module, m.reasons + m.effects) for m in mup.modules if m.verdict != "ok"]
    growths = [module.growth(quantity) for module in mup.modules for quantity in module.slopes]
    assert max(slope for slope in growths if slope is not None) <= 0.15
    sp = _check(config, "sp", seeds=1)
    hidden = [module for module in sp.modules if module.role == "hidden"]
    assert {"out_blocks.0.skip_linear", "mid_block.mlp.fc2"} <= {module.module for module in hidden}
    assert [module.module for module in hidden if module.verdict != "broken"] == []
