"""PixArt in float64 against a second, plain writing of it, for every option of the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.reference_pixart import reference_pixart
from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart, tiny_pixart
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.models import build_model

_OPTIONS: list[dict[str, Any]] = [
    {},
    {"mlp": "swiglu", "qk_norm": "rms"},
    {"mlp": "gelu", "learn_sigma": False, "qkv_bias": False},
    {"patch_size": 4, "in_channels": 3, "mlp_ratio": 2.5},
    {"pos_scale": 2.0, "output_mult": 3.0},
]


@pytest.mark.parametrize("options", _OPTIONS, ids=str)
def test_outputs_and_gradients_in_float64(options: dict[str, Any]) -> None:
    _compare(tiny_pixart(**options))


@pytest.mark.parametrize("width", [16, 64])
def test_readout_multiplier_under_mup(width: int) -> None:
    _compare(tiny_mup_pixart(width, output_mult=2.0))


def test_without_a_mask_all_tokens_are_seen() -> None:
    _compare(tiny_pixart(), masked=False)


def _compare(config: ModelConfig, *, masked: bool = True) -> None:
    model = build_model(config).double()
    randomize(model, 0.2)
    x, t, cond = pixart_inputs(config, masked=masked)
    weights = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    assert cond.text is not None
    out, expected = model(x, t, cond), reference_pixart(config, weights, x, t, cond.text, cond.text_mask)
    assert out.shape == expected.shape == (3, config.out_channels, 8, 8)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    out.square().mean().backward()
    expected.square().mean().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.grad, weights[name].grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
