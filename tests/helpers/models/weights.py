"""Weights for tiny models: random, and nowhere zero."""

from __future__ import annotations

import torch
from torch import nn

from megadit import rng


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.1) -> None:
    """Fill every parameter with keyed normals: zero starts would hide most of the model."""
    for name, param in model.named_parameters():
        param.copy_(std * rng.normal(rng.stream_key(7, name), param.shape))
