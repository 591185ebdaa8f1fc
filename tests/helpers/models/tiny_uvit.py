"""Tiny U-ViTs of the three kinds, and inputs for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from helpers.models.tiny_dit import dit_inputs
from megadit.conditioning import Conditioning
from megadit.config import ModelConfig
from megadit.mup.example import example_conditioning

TEXT = {"dim": 20, "max_length": 6}
KINDS: dict[str, dict[str, Any]] = {
    "class": {"num_classes": 10},
    "none": {"num_classes": 0},
    "text": {"num_classes": 0, "text": TEXT},
}


def tiny_uvit(kind: str = "class", **changes: Any) -> ModelConfig:
    """Depth 4 and the middle block, width 48, 2 heads, 8x8x4 inputs, as the originals are: GELU, no bias of qkv."""
    values: dict[str, Any] = {
        "family": "uvit", "width": 48, "depth": 4, "heads": 2, "input_size": 8, "patch_size": 2, "mlp": "gelu",
        "qkv_bias": False, "learn_sigma": False,
    }  # fmt: skip
    return ModelConfig(**{**values, **KINDS[kind], **changes})


def tiny_mup_uvit(width: int, base_width: int = 32, kind: str = "class", **changes: Any) -> ModelConfig:
    """The same under muP at a fixed head_dim of 16."""
    mup = {"width": width, "heads": None, "head_dim": 16, "parametrization": "mup", "base_width": base_width}
    return tiny_uvit(kind, **{**mup, **changes})


def uvit_inputs(config: ModelConfig, batch: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    """(x, t, cond): labels with the null one among them, or texts of several lengths with their mask."""
    x, t, cond = dit_inputs(config, batch)
    return (x, t, cond) if config.text is None else (x, t, example_conditioning(config, range(batch)))
