"""MMDiT in float64 against a second, plain writing of it, for every option of the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.reference_mmdit import mmdit_positions, reference_mmdit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit, tiny_mup_mmdit
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.models import build_model
from megadit.models.layers import CroppedPositions

# Options of the model, size of the latent, lengths of the texts.
_CASES: list[tuple[dict[str, Any], tuple[int, int] | None, list[int] | None]] = [
    ({}, None, None),
    ({"mlp": "swiglu", "qk_norm": "rms"}, None, [5, 1, 3]),
    ({"mlp": "gelu", "pooled": 12, "pos_embed_max_size": 6}, (8, 6), [2, 5, 4]),
    ({"patch_size": 4, "in_channels": 3, "mlp_ratio": 2.5, "learn_sigma": True}, (12, 4), None),
    (
        {"qkv_bias": False, "qk_norm": "rms", "pos_embed_max_size": 5, "depth": 1, "output_mult": 3.0},
        (4, 10),
        [0, 1, 5],
    ),
]


@pytest.mark.parametrize(("options", "size", "lengths"), _CASES, ids=str)
def test_outputs_and_gradients_in_float64(options: Any, size: Any, lengths: Any) -> None:
    _compare(tiny_mmdit(**options), size, lengths)


@pytest.mark.parametrize("width", [16, 64])
def test_readout_multiplier_under_mup(width: int) -> None:
    _compare(tiny_mup_mmdit(width, output_mult=2.0, mlp="swiglu"), None, [3, 4, 5])


def _compare(config: ModelConfig, size: tuple[int, int] | None, lengths: list[int] | None) -> None:
    model = build_model(config).double()
    randomize(model, 0.2)
    x, t, cond = mmdit_inputs(config, size=size, lengths=lengths)
    weights = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    out, expected = model(x, t, cond), reference_mmdit(config, weights, x, t, cond)
    assert out.shape == expected.shape == (3, config.out_channels, *x.shape[-2:])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    out.square().mean().backward()
    expected.square().mean().backward()
    for name, param in model.named_parameters():
        expected_grad = torch.zeros_like(param) if weights[name].grad is None else weights[name].grad
        torch.testing.assert_close(param.grad, expected_grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("rows", "columns", "largest"), [(4, 4, None), (3, 5, None), (3, 5, 7), (7, 2, 7), (1, 1, 4)])
def test_positions(rows: int, columns: int, largest: int | None) -> None:
    config = tiny_mmdit(width=24, pos_embed_max_size=largest)
    positions = CroppedPositions(24, 4, largest)
    positions.reset_buffers()
    tokens = positions(torch.zeros(2, rows * columns, 24), rows, columns)
    torch.testing.assert_close(tokens[1].double(), mmdit_positions(config, rows, columns), rtol=0, atol=1e-6)
