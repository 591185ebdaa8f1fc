"""DiT in float64 against a second, plain writing of it, for every option of the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.reference_dit import reference_dit, reference_positions
from helpers.models.tiny_dit import dit_inputs, tiny_dit, tiny_mup_dit
from helpers.models.weights import randomize
from megadit.models import build_model
from megadit.models.layers import sincos_2d

_OPTIONS: list[dict[str, Any]] = [
    {},
    {"mlp": "swiglu", "qk_norm": "rms"},
    {"mlp": "gelu", "learn_sigma": False, "num_classes": 0},
    {"patch_size": 4, "in_channels": 3, "mlp_ratio": 2.5},
    {"output_mult": 3.0},
]


@pytest.mark.parametrize("options", _OPTIONS, ids=str)
def test_outputs_and_gradients_in_float64(options: dict[str, Any]) -> None:
    _compare(tiny_dit(**options))


@pytest.mark.parametrize("width", [16, 64])
def test_readout_multiplier_under_mup(width: int) -> None:
    _compare(tiny_mup_dit(width, output_mult=2.0))


def _compare(config: Any) -> None:
    model = build_model(config).double()
    randomize(model, 0.2)
    x, t, cond = dit_inputs(config)
    weights = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    out, expected = model(x, t, cond), reference_dit(config, weights, x, t, cond.labels)
    assert out.shape == expected.shape == (3, config.out_channels, 8, 8)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    out.square().mean().backward()
    expected.square().mean().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, weights[name].grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("side", [1, 4, 5])
def test_position_table(side: int) -> None:
    torch.testing.assert_close(sincos_2d(24, side, side), reference_positions(24, side).float(), rtol=0, atol=1e-6)


def test_positions_of_a_rectangle_are_row_major() -> None:
    table, square = sincos_2d(16, 2, 3).view(2, 3, 16), sincos_2d(16, 3, 3).view(3, 3, 16)
    assert torch.equal(table, square[:2])
