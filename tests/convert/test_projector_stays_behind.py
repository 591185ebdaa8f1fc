"""REPA's projector serves training alone: no family's export carries it into the formats of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.tiny_dit import tiny_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.convert import from_diffusers, from_official, to_diffusers, to_official
from megadit.models import build_model

_REPA: dict[str, Any] = {"repa": {"block": 1, "feature_dim": 8, "hidden": 16}}
_CONFIGS = {
    "dit": tiny_dit(**_REPA),
    "pixart": tiny_pixart(**_REPA),
    "uvit": tiny_uvit("class", **_REPA),
    "mmdit": tiny_mmdit(pooled=12, **_REPA),
}


@pytest.mark.parametrize("family", _CONFIGS)
@pytest.mark.parametrize("form", ["official", "diffusers"])
def test_the_projector_of_repa_stays_behind(family: str, form: str) -> None:
    if (family, form) == ("uvit", "diffusers"):
        pytest.skip("diffusers has no class for U-ViT")
    config = _CONFIGS[family]
    model = build_model(config)
    randomize(model, 0.1)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    assert any(name.startswith("repa.") for name in state)
    if form == "official":
        exported = to_official(config, state)
        config_back, state_back = from_official(family, exported, heads=2)
    else:
        folder_json, exported = to_diffusers(config, state)
        config_back, state_back = from_diffusers(folder_json, exported)
    assert not any("repa" in name for name in exported)
    assert config_back.repa is None
    without_repa: ModelConfig = config.model_copy(update={"repa": None})
    assert state_back.keys() == build_model(without_repa).state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in state_back.items())
