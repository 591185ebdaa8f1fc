"""DINOv2 (Oquab et al., arXiv 2304.07193), with or without registers, from a local folder by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megadit.data.features.encoder import FeatureEncoder, normalized, resized
from megadit.data.features.folders import DINOV2_CLASSES, DINOV2_KEY, IMAGE_MEAN, IMAGE_STD, check_folder
from megadit.data.text.folders import fingerprint, load_network, size


class Dinov2(FeatureEncoder):
    """The last layer's normed patch tokens, without class token and registers: F = hidden_size, one per patch.

    Raises UserError as ``check_folder`` does, or if transformers cannot load the folder.
    """

    def __init__(self, path: str | None, image_size: int = 224, device: torch.device | str = "cpu") -> None:
        config = check_folder(path, image_size)
        folder, kind = Path(str(path)), config.text("model_type")
        self.image_size = image_size
        self.dim, self._side = size(config, "hidden_size"), image_size // size(config, "patch_size")
        self._model = load_network(folder, DINOV2_CLASSES[kind], DINOV2_KEY, torch.float32).to(device)
        self.identity = f"{kind}-{fingerprint(folder)}-{image_size}"

    def _encode(self, images: Tensor) -> Tensor:
        pixels = normalized(resized(images, self.image_size), IMAGE_MEAN, IMAGE_STD)
        tokens: Tensor = self._model(pixel_values=pixels).last_hidden_state
        patches = tokens[:, -(self._side**2) :]  # the class token and the registers come first
        return patches.transpose(1, 2).reshape(len(images), self.dim, self._side, self._side)
