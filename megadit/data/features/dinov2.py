"""DINOv2 (Oquab et al., arXiv 2304.07193), with or without registers, from a local folder by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.data.features.encoder import FeatureEncoder, normalized, resized
from megadit.data.text.folders import fingerprint, load_network, read_config
from megadit.errors import UserError

_KEY = "data.features.path"
_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]


def check_folder(path: str | None, image_size: int) -> dict[str, Any]:
    """The folder's config.json; loads no weights.

    Raises:
        UserError: no folder, no DINOv2, or image_size is not a multiple of its patch size.
    """
    if path is None:
        raise UserError(f"{_KEY}: is missing; give the folder of a DINOv2 model of transformers on this machine")
    config = read_config(Path(path), _KEY, tuple(_CLASSES))
    patch = int(config["patch_size"])
    if image_size % patch:
        raise UserError(
            f"data.features.image_size: {image_size} is not a multiple of {patch}, the patch size of '{path}'; "
            f"set it to {max(1, round(image_size / patch)) * patch}"
        )
    return config


class Dinov2(FeatureEncoder):
    """The last layer's normed patch tokens, without class token and registers: F = hidden_size, one per patch.

    Raises UserError as ``check_folder`` does, or if transformers cannot load the folder.
    """

    def __init__(self, path: str | None, image_size: int = 224, device: torch.device | str = "cpu") -> None:
        config = check_folder(path, image_size)
        folder, kind = Path(str(path)), config["model_type"]
        self.image_size = image_size
        self.dim, self._side = int(config["hidden_size"]), image_size // int(config["patch_size"])
        self._model = load_network(folder, _CLASSES[kind], _KEY, torch.float32).to(device)
        self.identity = f"{kind}-{fingerprint(folder)}-{image_size}"

    def _encode(self, images: Tensor) -> Tensor:
        pixels = normalized(resized(images, self.image_size), _MEAN, _STD)
        tokens: Tensor = self._model(pixel_values=pixels).last_hidden_state
        patches = tokens[:, -(self._side**2) :]  # the class token and the registers come first
        return patches.transpose(1, 2).reshape(len(images), self.dim, self._side, self._side)
