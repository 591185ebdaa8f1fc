"""Tiny MMDiTs and inputs for them; weights come from ``weights.randomize``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadit import rng
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig


def tiny_mmdit(*, pooled: int = 0, **changes: Any) -> ModelConfig:
    """Depth 3, width 48, 2 heads, 8x8x4 inputs, five text tokens of 20 channels."""
    values: dict[str, Any] = {
        "family": "mmdit",
        "width": 48,
        "depth": 3,
        "heads": 2,
        "input_size": 8,
        "num_classes": 0,
        "learn_sigma": False,
        "text": {"dim": 20, "max_length": 5, "pooled_dim": pooled},
    }
    return ModelConfig(**{**values, **changes})


def tiny_mup_mmdit(width: int, base_width: int = 32, **changes: Any) -> ModelConfig:
    """The same under muP at a fixed head_dim of 16."""
    return tiny_mmdit(width=width, heads=None, head_dim=16, parametrization="mup", base_width=base_width, **changes)


def mmdit_inputs(
    config: ModelConfig, batch: int = 3, size: tuple[int, int] | None = None, lengths: list[int] | None = None
) -> tuple[Tensor, Tensor, Conditioning]:
    """(x, t, cond): ``size`` of the latent (default: the model's), text ``lengths`` to be told by a mask."""
    assert config.text is not None
    text, pooled = config.text, config.text.pooled_dim
    height, width = size or (config.input_size, config.input_size)

    def normal(name: str, *shape: int) -> Tensor:
        return rng.normal(rng.stream_key(1, name), (batch, *shape))

    mask = None if lengths is None else torch.arange(text.max_length) < torch.tensor(lengths)[:, None]
    cond = Conditioning(
        text=normal("text", text.max_length, text.dim),
        text_mask=mask,
        pooled=normal("pooled", pooled) if pooled else None,
    )
    return normal("x", config.in_channels, height, width), 999.0 * rng.uniform(rng.stream_key(1, "t"), (batch,)), cond
