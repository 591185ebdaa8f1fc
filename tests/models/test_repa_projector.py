"""REPA's projector: whose tokens it sees, what it computes, its place in every list, and its factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.models.tiny_dit import dit_inputs, tiny_dit, tiny_mup_dit
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.config.schema.optim import OptimConfig
from megadit.models import build_model, count_parameters
from megadit.mup import param_specs
from megadit.mup.groups import param_groups
from megadit.mup.table import rows

REPA = {"block": 1, "feature_dim": 20, "hidden": 40}


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_it_is_three_linears_with_silu_on_block_k(norm: str) -> None:
    config = tiny_dit(repa={**REPA, "norm": norm})
    model = build_model(config)
    randomize(model)
    x, t, cond = dit_inputs(config)
    output, projected = model(x, t, cond, project=True)
    plain, [first, _] = model(x, t, cond, taps=(1, 2))
    assert torch.equal(output, plain) and projected.shape == (3, 16, 20)

    weights = {name: value.double() for name, value in model.repa.state_dict().items()}  # type: ignore[union-attr]
    hidden = first.double() @ weights["fc1.weight"].T + weights["fc1.bias"]
    if norm == "rms":
        hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["norm.weight"]
    hidden = F.silu(hidden) @ weights["fc2.weight"].T + weights["fc2.bias"]
    expected = F.silu(hidden) @ weights["fc3.weight"].T + weights["fc3.bias"]
    torch.testing.assert_close(projected, expected.float(), rtol=1e-4, atol=1e-5)


def test_the_rest_of_the_model_is_the_same_without_it() -> None:
    alone, beside = build_model(tiny_dit(), seed=5), build_model(tiny_dit(repa=REPA), seed=5)
    others = {name: p for name, p in beside.named_parameters() if not name.startswith("repa.")}
    assert others.keys() == dict(alone.named_parameters()).keys()
    assert all(torch.equal(others[name], p) for name, p in alone.named_parameters())
    assert alone.repa is None and "repa.fc1.weight" in dict(beside.named_parameters())


def test_it_is_in_every_list() -> None:
    config = tiny_mup_dit(64, repa={**REPA, "norm": "rms"})
    model = build_model(config)
    names = [f"repa.{name}" for name in ("fc1.weight", "fc1.bias", "norm.weight", "fc2.weight", "fc3.bias")]
    assert set(names) < set(param_specs(model))
    assert set(names) < {row["name"] for row in rows(model, OptimConfig())}
    assert set(names) < {name for group in param_groups(model, OptimConfig()) for name in group["param_names"]}
    size = (64 + 1) * 40 + 40 + (40 + 1) * 40 + (40 + 1) * 20
    assert count_parameters(config) - count_parameters(config.model_copy(update={"repa": None})) == size


def test_its_first_linear_is_a_readout_that_starts_at_random() -> None:
    wide, base = (param_specs(build_model(tiny_mup_dit(w, 64, repa=REPA))) for w in (256, 64))
    first = wide["repa.fc1.weight"]
    assert (first.role, first.forward_mult, first.lr_mult, first.wd_mult) == ("output", 0.25, 1.0, 1.0)
    assert first.init_std == base["repa.fc1.weight"].init_std == pytest.approx(0.1 * 64**-0.5)
    bias = wide["repa.fc1.bias"]
    assert bias.role == "finite" and bias.init_std == base["repa.fc1.bias"].init_std > 0
    for name in ("repa.fc2.weight", "repa.fc2.bias", "repa.fc3.weight", "repa.fc3.bias"):
        assert wide[name].role == "finite" and wide[name] == base[name]


def test_the_readout_multiplier_is_not_its() -> None:
    specs = param_specs(build_model(tiny_mup_dit(128, 64, repa=REPA, output_mult=8.0)))
    assert specs["final_layer.linear.weight"].forward_mult == 4.0
    assert specs["repa.fc1.weight"].forward_mult == 0.5


def test_sp_and_mup_are_one_model_at_the_base_width() -> None:
    changes = {"repa": REPA, "init": "fan_in"}
    mup = build_model(tiny_mup_dit(64, 64, **changes))
    sp = build_model(tiny_dit(width=64, heads=None, head_dim=16, **changes))
    assert all(torch.equal(a, b) for a, b in zip(mup.parameters(), sp.parameters(), strict=True))
    assert param_specs(mup)["repa.fc1.weight"].forward_mult == 1.0


def test_without_a_projector_it_is_refused() -> None:
    config = tiny_dit()
    x, t, cond = dit_inputs(config)
    with pytest.raises(ValueError, match="no REPA projector"):
        build_model(config)(x, t, cond, project=True)


def test_it_lies_on_the_meta_device_too() -> None:
    config = ModelConfig(**{**tiny_dit().model_dump(), "repa": REPA})
    model = build_model(config, device="meta")
    assert isinstance(model.repa, nn.Module) and model.repa_block == 1
    assert all(parameter.is_meta for parameter in model.repa.parameters())
