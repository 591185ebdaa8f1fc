"""Tiny PixArts, and inputs whose texts have different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadit import rng
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig


def tiny_pixart(**changes: Any) -> ModelConfig:
    """Depth 2, width 48, 2 heads, 8x8x4 inputs, texts of up to 7 tokens of 20 channels, learned variance."""
    values: dict[str, Any] = {"family": "pixart", "width": 48, "depth": 2, "heads": 2, "input_size": 8}
    values |= {"num_classes": 0, "text": {"dim": 20, "max_length": 7}}
    return ModelConfig(**{**values, **changes})


def tiny_mup_pixart(width: int, base_width: int = 32, **changes: Any) -> ModelConfig:
    """The same under muP at a fixed head_dim of 16."""
    return tiny_pixart(width=width, heads=None, head_dim=16, parametrization="mup", base_width=base_width, **changes)


def pixart_inputs(config: ModelConfig, batch: int = 3, *, masked: bool = True) -> tuple[Tensor, Tensor, Conditioning]:
    """(x, t, cond); with ``masked`` texts of 5, 1, 7, 4, 2, ... tokens."""
    assert config.text is not None
    length, dim = config.text.max_length, config.text.dim
    x = rng.normal(rng.stream_key(1, "x"), (batch, config.in_channels, config.input_size, config.input_size))
    t = (999.0 * rng.uniform(rng.stream_key(1, "t"), (batch,))).round()
    text = rng.normal(rng.stream_key(1, "text"), (batch, length, dim))
    lengths = torch.tensor([1 + (4 + 3 * number) % length for number in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    return x, t, Conditioning(text=text, text_mask=mask if masked else None)
