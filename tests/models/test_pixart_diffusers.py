"""PixArt against diffusers' PixArtTransformer2DModel at random nonzero weights: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models.tiny_pixart import pixart_inputs, tiny_pixart
from helpers.models.weights import randomize
from megadit.models import build_model
from megadit.models.pixart.convert import to_diffusers

_OPTIONS: list[dict[str, Any]] = [
    {},
    {"mlp": "gelu", "qkv_bias": False, "learn_sigma": False, "pos_scale": 2.0},
]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", _OPTIONS, ids=str)
def test_outputs_and_all_gradients_equal_diffusers(options: dict[str, Any], masked: bool, capfd: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = tiny_pixart(width=144, depth=3, **options)
    ours = build_model(config)
    randomize(ours, 0.05)
    config_json, weights = to_diffusers(config, ours.state_dict())
    theirs = diffusers.PixArtTransformer2DModel.from_config(config_json).eval()
    assert capfd.readouterr().err == ""  # no key of the config is unknown there
    theirs.load_state_dict(weights)  # every name, and none left over
    x, t, cond = pixart_inputs(config, masked=masked)

    out = ours(x, t, cond)
    expected = theirs(x, encoder_hidden_states=cond.text, timestep=t, encoder_attention_mask=cond.text_mask).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)

    out.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: param.grad for name, param in ours.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    _, renamed = to_diffusers(config, gradients)  # type: ignore[arg-type]
    their_gradients = {name: param.grad for name, param in theirs.named_parameters()}
    assert renamed.keys() == their_gradients.keys()
    for name, gradient in renamed.items():
        expected = their_gradients[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        if not name.endswith("to_k.bias"):  # whose gradient is zero
            torch.testing.assert_close(gradient.norm(), expected.norm(), rtol=1e-4, atol=0)
