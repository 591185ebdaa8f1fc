"""Tiny DiTs and inputs for them; ``weights.randomize`` draws weights that are nowhere zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadit import rng
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig


def tiny_dit(**changes: Any) -> ModelConfig:
    """Depth 2, width 48, 2 heads, 8x8x4 inputs, 10 classes, learned variance."""
    values: dict[str, Any] = {"width": 48, "depth": 2, "heads": 2, "input_size": 8, "num_classes": 10}
    return ModelConfig(**{**values, **changes})


def tiny_mup_dit(width: int, base_width: int = 32, **changes: Any) -> ModelConfig:
    """The same under muP at a fixed head_dim of 16."""
    return tiny_dit(width=width, heads=None, head_dim=16, parametrization="mup", base_width=base_width, **changes)


def dit_inputs(config: ModelConfig, batch: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    """(x, t, cond) with the null label among the labels."""
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    x = rng.normal(rng.stream_key(1, "x"), shape)
    t = 999.0 * rng.uniform(rng.stream_key(1, "t"), (batch,))
    labels = torch.arange(batch) * 3 % config.num_classes if config.num_classes else None
    if labels is not None:
        labels[-1] = config.num_classes
    return x, t, Conditioning(labels=labels)
