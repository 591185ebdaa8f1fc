"""Every key of ``model.*`` does something in every family, or is refused: an option that nothing reads is a defect."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.config.schema.model import RepaConfig, Role, RoleHP, TextInput
from megadit.models import build_model
from megadit.mup.example import example_conditioning, example_images
from megadit.mup.spec import walk_specs

TEXT = {"dim": 20, "max_length": 5}
BASE: dict[str, Any] = {
    "width": 32, "depth": 2, "head_dim": 8, "patch_size": 2, "in_channels": 2, "input_size": 8, "learn_sigma": False,
    "num_classes": 0, "parametrization": "mup", "base_width": 16, "qk_norm": "rms",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {"num_classes": 3},
    "pixart": {"text": TEXT},
    "uvit": {"num_classes": 3},
    "uvit-text": {"family": "uvit", "text": TEXT},
    "mmdit": {"text": {**TEXT, "pooled_dim": 6}},
}
# Another value of every key. ``family`` is what the test walks over; ``heads`` takes head_dim's place.
OTHER: dict[str, Any] = {
    "width": 48, "depth": 4, "heads": 2, "head_dim": 16, "patch_size": 4, "in_channels": 3, "input_size": 16,
    "learn_sigma": True, "mlp": "swiglu", "mlp_ratio": 2.0, "qk_norm": "none", "attention_precision": "fp32",
    "norm_precision": "fp32", "qkv_bias": False, "num_classes": 5, "text": None, "repa": {"block": 1, "hidden": 8},
    "pos_scale": 2.0, "pos_embed_max_size": 6, "conv": False, "mlp_time_embed": True, "parametrization": "sp",
    "base_width": 8, "output_mult": 2.0, "init": "original", "adaln_init": "zero",
}  # fmt: skip
TEXTS = {"dim": 24, "max_length": 6, "pooled_dim": 3, "mask": False}
PROJECTOR = {"block": 2, "feature_dim": 10, "hidden": 12, "norm": "rms"}
# (family, key): what says no. All other pairs must do something.
REFUSED = {
    **{("dit", f"text.{key}"): "text: belongs to families" for key in ("dim", "max_length", "pooled_dim", "mask")},
    **{(name, "text"): f"text: is missing, and {name} is conditioned" for name in ("pixart", "mmdit")},
    **{(name, "num_classes"): "num_classes: 5" for name in ("pixart", "mmdit", "uvit-text")},
    **{(name, "text.pooled_dim"): "text.pooled_dim: 3" for name in ("pixart", "uvit-text")},
    **{("uvit", f"text.{key}"): "num_classes: 3 beside text" for key in ("dim", "max_length", "mask")},
    ("uvit", "text.pooled_dim"): "text.pooled_dim: 3",
    **{(name, "adaln_init"): "adaln_init: zero" for name in ("uvit", "uvit-text")},
    **{(name, "pos_scale"): "pos_scale: 2.0" for name in ("dit", "uvit", "uvit-text", "mmdit")},
    **{(name, "pos_embed_max_size"): "pos_embed_max_size: 6" for name in ("dit", "uvit", "uvit-text", "pixart")},
    **{(name, "conv"): "conv: False" for name in ("dit", "pixart", "mmdit")},
    **{(name, "mlp_time_embed"): "mlp_time_embed: True" for name in ("dit", "pixart", "mmdit")},
    **{(name, "role_hps.vector.mult"): "role_hps.vector.mult: 3 has no effect" for name in FAMILIES},
    **{(name, "role_hps.output.mult"): "role_hps.output.mult: the readout" for name in FAMILIES},
    **{(name, "role_hps.output.init_std"): "role_hps.output.init_std: 3 has no effect" for name in FAMILIES},
    **{
        (name, f"role_hps.finite.{factor}"): f"role_hps.finite.{factor}: 3 has no effect"
        for name in ("dit", "pixart", "mmdit")
        for factor in ("mult", "init_std")
    },
    **{
        (name, "role_hps.vector.init_std"): "role_hps.vector.init_std: 3 has no effect"
        for name in ("dit", "uvit", "uvit-text", "mmdit")
    },
}
# What the run's data read and the model only sees in its inputs: held by tests/data/test_conditions.py.
OF_THE_DATA = {
    *((name, "text.mask") for name in ("pixart", "uvit-text", "mmdit")),
    *((name, "text.max_length") for name in ("pixart", "mmdit")),
}
KEYS = [
    *OTHER,
    *(f"text.{key}" for key in TEXTS),
    *(f"repa.{key}" for key in PROJECTOR),
    *(f"role_hps.{role}.{factor}" for role in Role.__args__ for factor in RoleHP.model_fields),
]


def _values(name: str) -> dict[str, Any]:
    return {"family": name, **BASE, **FAMILIES[name]}


def _config(name: str, key: str) -> tuple[ModelConfig, ModelConfig]:
    """The family's model without and with another value of ``key``. Raises ValidationError where that is refused."""
    values = _values(name)
    if key.startswith("repa."):
        values["repa"] = {"block": 1, "feature_dim": 8, "hidden": 8}
        changed = {"repa": {**values["repa"], key[5:]: PROJECTOR[key[5:]]}}
    elif key.startswith("text."):
        changed = {"text": {**(values.get("text") or TEXT), key[5:]: TEXTS[key[5:]]}}
    elif key.startswith("role_hps."):
        _, role, factor = key.split(".")
        changed = {"role_hps": {role: {factor: 3.0}}}
    else:
        changed = {key: OTHER[key], **({"head_dim": None} if key == "heads" else {})}
        if key == "text" and not values.get("text"):
            values["text"] = None
            changed = {"text": TEXT, "num_classes": 0}  # a family that takes texts, or refuses them
    return ModelConfig.model_validate(values), ModelConfig.model_validate({**values, **changed})


def _declared(config: ModelConfig) -> list[Any]:
    """Names and specs of the parameters, and what is asked to compute in which precision."""
    model = build_model(config, device="meta")
    specs = [(name, dataclasses.astuple(spec)) for name, _, spec in walk_specs(model)]
    return [*specs, *((name, m.precision) for name, m in model.named_modules() if hasattr(m, "precision"))]


def _computed(config: ModelConfig) -> list[Any]:
    """What the model makes of its inputs at random weights."""
    model = build_model(config)
    randomize(model, 0.3)
    numbers, t = range(2), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        cond = example_conditioning(config, numbers)
        out = model(example_images(config, numbers), t, cond, project=config.repa is not None)
    return [value.tolist() for value in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_works_or_is_refused(name: str) -> None:
    for key in KEYS:
        if (name, key) in REFUSED or (name, key) == ("dit", "text"):
            with pytest.raises(ValidationError) as raised:
                _config(name, key)
            assert REFUSED.get((name, key), "text: belongs to") in str(raised.value), key
            continue
        plain, changed = _config(name, key)
        if (name, key) in OF_THE_DATA:
            continue
        same = _declared(changed) == _declared(plain) and _computed(changed) == _computed(plain)
        assert not same, f"{key} does nothing in {name}"


def test_no_key_is_left_out() -> None:
    assert set(OTHER) | {"family", "options", "role_hps"} == set(ModelConfig.model_fields)
    assert set(TEXTS) == set(TextInput.model_fields) and set(PROJECTOR) == set(RepaConfig.model_fields)
