"""Parameter groups of whole and partial models, and specs that are missing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.models.tiny_dit import tiny_mup_dit
from megadit.config import OptimConfig
from megadit.models import build_model
from megadit.mup import param_specs
from megadit.mup.groups import param_groups

_OPTIM = OptimConfig(lr=0.5, weight_decay=0.25, eps=1e-6, eps_mode="scaled")


def test_groups_carry_values_of_their_rows() -> None:
    model = build_model(tiny_mup_dit(128))
    groups = {group["name"]: group for group in param_groups(model, _OPTIM)}
    hidden = groups["hidden"]
    assert (hidden["lr_mult"], hidden["wd_mult"], hidden["eps_mult"]) == (0.25, 4.0, 0.25)
    assert (hidden["lr"], hidden["weight_decay"], hidden["eps"]) == (0.125, 1.0, 0.25e-6)
    assert groups["vector"]["lr"] == 0.5 and groups["vector"]["weight_decay"] == 0.0
    parameters = dict(model.named_parameters())
    for group in groups.values():
        assert all(parameters[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    torch.optim.AdamW(list(groups.values()), lr=_OPTIM.lr)


def test_a_part_of_the_model_pads_its_groups() -> None:
    model = build_model(tiny_mup_dit(64))
    all_groups = param_groups(model, _OPTIM)
    part = nn.ModuleDict({"final_layer": model.final_layer})
    groups = param_groups(part, _OPTIM, param_specs(model))
    assert [group["name"] for group in groups] == [group["name"] for group in all_groups]
    assert {name for group in groups for name in group["param_names"]} == {
        name for name in param_specs(model) if name.startswith("final_layer.")
    }
    assert next(group for group in groups if group["name"] == "input")["params"] == []


def test_frozen_parameters_are_left_out() -> None:
    model = build_model(tiny_mup_dit(64))
    model.x_embedder.requires_grad_(False)
    names = {name for group in param_groups(model, _OPTIM) for name in group["param_names"]}
    assert names == {name for name, param in model.named_parameters() if param.requires_grad}


def test_a_parameter_without_spec_is_named() -> None:
    model = build_model(tiny_mup_dit(64))
    model.extra = nn.Linear(2, 2)
    with pytest.raises(LookupError, match=r"extra\.weight of Linear has no ParamSpec"):
        param_specs(model)
