"""Presets: the published sizes, and the paper's μP versions."""

from __future__ import annotations

import pytest

from megadit.config import preset, preset_names
from megadit.errors import UserError

# Table 1 of the DiT paper: layers, hidden size, heads.
PUBLISHED = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str, patch: int):
    depth, width, heads = PUBLISHED[size]
    for suffix in ("", "-mup"):
        model = preset(f"dit-{size}-{patch}{suffix}")
        assert (model.depth, model.width, model.num_heads, model.patch_size) == (depth, width, heads, patch)
        assert (model.family, model.in_channels, model.input_size, model.num_classes) == ("dit", 4, 32, 1000)
        assert model.learn_sigma and model.mlp == "gelu_tanh" and model.mlp_ratio == 4.0 and model.qk_norm == "none"
        assert model.output_mult == 1.0
    sp, mup = preset(f"dit-{size}-{patch}"), preset(f"dit-{size}-{patch}-mup")
    assert (sp.parametrization, sp.base_width, sp.init_scheme, sp.adaln_zero) == ("sp", None, "original", True)
    assert (mup.parametrization, mup.base_width, mup.init_scheme, mup.adaln_zero) == ("mup", 288, "fan_in", False)


@pytest.mark.parametrize("width", [144, 288, 576, 1152])
def test_mup_scales_width_by_heads(width: int):
    model = preset("dit-xl-2-mup")
    scaled = type(model)(**(model.model_dump(exclude={"role_hps"}) | {"width": width}))
    assert (scaled.num_heads, scaled.head_channels, scaled.width_mult) == (width // 72, 72, width / 288)


def test_names():
    assert len(preset_names()) == 40
    assert {"dit-s-8", "dit-xl-2-mup", "pixart-proxy-mup", "uvit-h", "mmdit-18b-mup"} <= set(preset_names())
    with pytest.raises(UserError, match=r"^model.preset: 'dit-xxl-2' is not a preset; did you mean dit-xl-2\?"):
        preset("dit-xxl-2")
