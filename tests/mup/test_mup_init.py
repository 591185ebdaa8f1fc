"""Initial values: their statistics, and that they depend on (seed, name, element) alone."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.models.tiny_dit import tiny_dit, tiny_mup_dit
from megadit.models import build_model
from megadit.mup import param_specs
from megadit.mup.init import init_parameters, init_values


@pytest.mark.parametrize("init", ["original", "fan_in"])
def test_values_have_the_declared_distribution(init: str) -> None:
    model = build_model(tiny_mup_dit(96, init=init, qk_norm="rms"))
    specs = param_specs(model)
    for name, param in model.named_parameters():
        spec = specs[name]
        if spec.init_std == 0.0:
            assert torch.equal(param, torch.full_like(param, 1.0 if "_norm" in name else 0.0)), name
            continue
        n = param.numel()
        assert abs(param.mean()) < 5 * spec.init_std / math.sqrt(n), name
        assert param.std().item() == pytest.approx(spec.init_std, rel=5 / math.sqrt(n)), name
        bound = param.abs().max().item() / spec.init_std
        assert (bound <= math.sqrt(3) + 1e-6) == (spec.init_dist == "uniform"), name


def test_same_name_same_values_in_another_model_and_order() -> None:
    one, other = build_model(tiny_dit(depth=3), seed=5), build_model(tiny_dit(depth=1), seed=5)
    wanted = dict(one.named_parameters())
    for name, param in other.named_parameters():
        assert torch.equal(param, wanted[name]), name
    torch.manual_seed(1)
    again = build_model(tiny_dit(depth=3), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


def test_seeds_and_names_give_different_values() -> None:
    model, other = build_model(tiny_dit(), seed=0), build_model(tiny_dit(), seed=1)
    name = "blocks.0.attn.proj.weight"
    first, second = dict(model.named_parameters()), dict(other.named_parameters())
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first["blocks.1.attn.proj.weight"])


@pytest.mark.parametrize("init", ["original", "fan_in"])
def test_a_range_of_elements_is_drawn_alone(init: str) -> None:
    model = build_model(tiny_dit(init=init), seed=2)
    name = "blocks.1.mlp.fc1.weight"
    spec = param_specs(model)[name]
    parameter = dict(model.named_parameters())[name].flatten()
    assert torch.equal(init_values(spec, name, 2, start=1001, count=777), parameter[1001:1778])
    assert torch.equal(init_values(spec, name, 2, start=9000), parameter[9000:])


def test_long_parameters_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny_dit(), seed=2)
    monkeypatch.setattr("megadit.mup.init._CHUNK", 1000)
    again = build_model(tiny_dit(), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_other_dtypes_hold_the_same_values_rounded() -> None:
    model = build_model(tiny_dit(), seed=2)
    half = build_model(tiny_dit(), device="meta").bfloat16().to_empty(device="cpu")
    init_parameters(half, 2)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), half.parameters(), strict=True))
