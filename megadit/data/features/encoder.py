"""``FeatureEncoder``: from pictures to a grid of features, by a frozen pretrained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_PER_PASS = 32  # images through a network at once: its activations are far larger than its features


class FeatureEncoder(ABC):
    """identity: what the features depend on beside the images, for the names of stored ones.  dim: their channels F."""

    identity: str
    dim: int

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """RGB or grey images (B, 3 or 1, H, W) in [-1, 1] of any size -> features float32 (B, F, h, w)."""
        images = images.float()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return torch.cat([self._encode(part) for part in images.split(_PER_PASS)])

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """The same for a few float32 RGB images."""


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) as squares of ``side`` pixels, bicubic with antialiasing; unchanged if they are."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """From [-1, 1] to (v - mean) / std, channel by channel, of the value v in [0, 1]."""
    shape = (1, len(mean), 1, 1)
    scale, shift = images.new_tensor(std).view(shape), images.new_tensor(mean).view(shape)
    return ((images + 1) / 2 - shift) / scale
