"""U-ViT against a second, plain writing of it: outputs and every gradient, for its kinds and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.reference_uvit import reference_uvit
from helpers.models.tiny_uvit import KINDS, tiny_mup_uvit, tiny_uvit, uvit_inputs
from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.models import build_model

_OPTIONS: list[dict[str, Any]] = [
    {},
    {"mlp_time_embed": True, "qkv_bias": True},
    {"mlp": "swiglu", "qk_norm": "rms", "conv": False},
    {"mlp": "gelu_tanh", "learn_sigma": True, "depth": 2, "mlp_ratio": 2.5},
    {"patch_size": 4, "in_channels": 3, "output_mult": 3.0},
]


def _compare(config: ModelConfig, dtype: torch.dtype, atol: float, masked: bool = True) -> None:
    model = build_model(config).to(dtype)
    randomize(model, 0.2 if dtype == torch.float64 else 0.1)
    x, t, cond = uvit_inputs(config)
    mask = cond.text_mask if masked else None
    cond = cond if masked else type(cond)(labels=cond.labels, text=cond.text)
    weights = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    out = model(x, t, cond)
    expected = reference_uvit(config, weights, x, t, cond.labels, cond.text, mask)
    assert out.shape == expected.shape == (3, config.out_channels, 8, 8) and out.dtype == dtype
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    out.square().mean().backward()
    expected.square().mean().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, weights[name].grad, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("options", _OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_in_float64(kind: str, options: dict[str, Any]) -> None:
    _compare(tiny_uvit(kind, **options), torch.float64, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_in_float32(kind: str) -> None:
    _compare(tiny_uvit(kind), torch.float32, 2e-5)


def test_text_without_a_mask_is_seen_whole() -> None:
    _compare(tiny_uvit("text"), torch.float64, 1e-9, masked=False)


@pytest.mark.parametrize("width", [16, 64])
def test_multipliers_under_mup(width: int) -> None:
    roles = {"hidden": {"mult": 1.5}, "input": {"mult": 0.5}, "finite": {"mult": 2.0}}
    kinds = {"mlp_time_embed": True, "output_mult": 2.0, "role_hps": roles}
    for kind in KINDS:
        _compare(tiny_mup_uvit(width, kind=kind, **kinds), torch.float64, 1e-9)
