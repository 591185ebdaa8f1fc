"""A codec of the plugin: the mean of each block of pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.codec import Codec, scale_and_shift
from megadit.data.codecs.folder import codec_folder, read_facts


class BlockMeans(Codec):
    """Exact for images of flat blocks."""

    def __init__(self, config: VaeConfig, device: torch.device | str = "cpu") -> None:
        facts = read_facts(codec_folder(config))
        self.factor, self.channels = facts.factor, facts.channels
        self.scale, _ = scale_and_shift(config, facts)

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Scaled means; there is nothing to draw."""
        return F.avg_pool2d(images.float(), self.factor) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Each value over its block."""
        return F.interpolate(latents.float() / self.scale, scale_factor=self.factor, mode="nearest")
