"""MMDiT under muP: its table of roles and factors, equality with the mup package, and the coordinate check."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit, tiny_mup_mmdit
from helpers.models.weights import randomize
from helpers.mup_checks import (
    BASE,
    assert_equals_the_package,
    assert_mup_at_the_base_is_sp,
    coordinate_verdict,
    package_model,
)
from megadit.models import StagedModel, build_model
from megadit.mup import param_specs
from megadit.mup.example import example_conditioning

_OPTIONS: dict[str, Any] = {"mlp": "swiglu", "qk_norm": "rms", "pooled": 64, "depth": 2}
_TEXT = {"dim": 64, "max_length": 5, "pooled_dim": 64}  # as wide as one of the widths, as 4096 may be


@pytest.mark.parametrize("width", [32, 64, 128])
def test_roles_and_factors(width: int) -> None:
    m = width / BASE
    specs = param_specs(build_model(tiny_mup_mmdit(width, text=_TEXT, output_mult=2.0, **_OPTIONS), device="meta"))
    hidden = (m, 1 / m, 1.0)  # of weight decay, learning rate, forward multiplier
    expected = {
        "x_embedder.proj.weight": ("input", 1.0, 1.0, 1.0),
        "context_embedder.weight": ("input", 1.0, 1.0, 1.0),
        "y_embedder.mlp.0.weight": ("input", 1.0, 1.0, 1.0),
        "y_embedder.mlp.2.weight": ("hidden", *hidden),
        "t_embedder.mlp.0.weight": ("input", 1.0, 1.0, 1.0),
        "t_embedder.mlp.2.weight": ("hidden", *hidden),
        "final_layer.linear.weight": ("output", 1.0, 1.0, 2.0 / m),
        "final_layer.linear.bias": ("finite", 0.0, 1.0, 1.0),
        "final_layer.adaLN_modulation.1.weight": ("hidden", *hidden),
        "context_embedder.bias": ("vector", 0.0, 1.0, 1.0),
    }
    for stream in ("x_block", "context_block"):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            expected[f"joint_blocks.0.{stream}.{layer}.weight"] = ("hidden", *hidden)
            expected[f"joint_blocks.0.{stream}.{layer}.bias"] = ("vector", 0.0, 1.0, 1.0)
        for gain in ("attn.ln_q", "attn.ln_k"):
            expected[f"joint_blocks.0.{stream}.{gain}.weight"] = ("finite", 0.0, 1.0, 1.0)
    for name, values in expected.items():
        spec = specs[name]
        assert (spec.role, spec.wd_mult, spec.lr_mult, spec.forward_mult) == values, name
    zero = {name for name, spec in specs.items() if spec.init_std == 0 and spec.init_value == 0 and len(spec.shape) > 1}
    assert zero == {"final_layer.linear.weight"}  # the paper's muP does not start the modulation at zero


def test_adaln_zero_is_an_option() -> None:
    specs = param_specs(build_model(tiny_mup_mmdit(64, adaln_init="zero"), device="meta"))
    modulations = [spec for name, spec in specs.items() if name.endswith("adaLN_modulation.1.weight")]
    assert len(modulations) == 7 and all(spec.init_std == 0.0 for spec in modulations)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_lr_wd_and_shapes_equal_the_package(width: int) -> None:
    def sp(size: int) -> StagedModel:
        return build_model(tiny_mmdit(width=size, heads=None, head_dim=16, init="fan_in", text=_TEXT, **_OPTIONS))

    ours = build_model(tiny_mup_mmdit(width, BASE, text=_TEXT, **_OPTIONS))
    assert_equals_the_package(ours, package_model(sp, width))


def test_mup_at_the_base_width_is_sp_bit_for_bit() -> None:
    options = {"init": "fan_in", "adaln_init": "fan_in", "output_mult": 2.0, "pooled": 12, "depth": 2}
    assert_mup_at_the_base_is_sp(partial(tiny_mmdit, **options), partial(mmdit_inputs, lengths=[5, 1, 2]))


@pytest.mark.parametrize("init", ["fan_in", "original"])
def test_coordinate_check_passes_mup_and_fails_sp(init: str) -> None:
    model = tiny_mup_mmdit(64, 64, depth=2, init=init, mlp="swiglu", pooled=12)
    mup = coordinate_verdict(model)
    assert mup.passed, [(m.module, m.reasons, m.effects) for m in mup.modules if m.verdict != "ok"]
    sp = coordinate_verdict(model, "sp")
    # SP's hidden and output weights learn too fast, and those alone; patches start too small by xavier's fan-out.
    fan_in_grows = {m.module for m in sp.modules if m.role in ("hidden", "output") and m.module != "output"}
    broken = set(sp.broken) - ({"x_embedder.proj"} if init == "original" else set())
    assert not sp.passed and broken <= fan_in_grows
    assert len(broken) >= 0.9 * len(fan_in_grows), fan_in_grows - broken


def test_example_texts_reach_the_model_in_every_width() -> None:
    """The pooled and token features that the check feeds move the output once the weights are not zero."""
    config = tiny_mup_mmdit(64, pooled=12)
    model = build_model(config)
    randomize(model)
    x, t, _ = mmdit_inputs(config)
    a, b = (model(x, t, example_conditioning(config, numbers)) for numbers in ([0, 1, 2], [3, 4, 5]))
    assert not torch.allclose(a, b, atol=1e-4)
