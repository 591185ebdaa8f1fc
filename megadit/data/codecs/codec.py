"""Codecs: from images to the model's inputs and back. Pixels as they are, or an autoencoder's latents.

A codec encodes images in [-1, 1] and one key per sample, so that a sample's latent does not depend on its batch.
``_class_name`` in the ``config.json`` of the folder at ``data.vae.path`` says which codec of ``CODECS`` it holds.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.folder import CodecFacts, codec_facts, codec_folder, read_facts
from megadit.data.dataset import StoredFacts, latents_of
from megadit.errors import UserError
from megadit.extensions import CODECS
from megadit.rng import batch_normal


class Codec(ABC):
    """factor: image pixels per latent pixel along a side.  channels: of the latents; None: those of the image.

    decodes: whether ``decode`` can be called, so that pictures can be sampled.  fitted_scale: scale and shift are part
    of the codec, so that ``data.vae.scale`` and ``shift`` may not differ.

    A codec of a folder is a class in ``megadit.extensions.CODECS`` under the ``_class_name`` of the folder's
    ``config.json``, called as ``cls(config.data.vae, device)``; a plugin adds its own. Beside that name the file says
    factor, channels, image_channels, scaling_factor and shift_factor; the weights are .safetensors files.
    """

    factor: int
    channels: int | None
    decodes: bool = True
    fitted_scale: bool = False

    @abstractmethod
    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] and keys (B,) int64 -> latents float32 (B, c, H / factor, W / factor)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, float32 (B, C, H, W), about [-1, 1]."""


class GaussianCodec(Codec):
    """A codec whose latents are sampled from a Gaussian posterior, with noise keyed by sample."""

    @abstractmethod
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32 (B, c, h, w) each, scaled as the model takes them."""

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """A sample of the posterior of each image. Raises UserError if the size or channels do not fit."""
        return _sample_gaussian(*self.posterior(images), keys)


class PixelCodec(Codec):
    """The model works on pixels: nothing changes."""

    factor = 1
    channels = None

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """The images in float32."""
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The latents in float32."""
        return latents.float()


class StoredCodec(Codec):
    """Latents that were encoded before: only sampled from their posterior, where that was stored.

    The codec at ``data.vae.path`` decodes, and is loaded for the first picture; without a path ``decodes`` is False.
    """

    def __init__(self, stored: StoredFacts, config: VaeConfig | None, device: torch.device | str = "cpu") -> None:
        self.stored, self.config, self.device = stored, config, torch.device(device)
        self.factor, self.channels = stored.factor, stored.channels
        self.decodes = config is not None and config.path is not None
        self._decoder: Codec | None = None

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Latents as they are, in float32; of moments (B, 2c, h, w) a sample, with noise keyed by sample."""
        if not self.stored.moments:
            return images.float()
        mean, std = images.float().chunk(2, dim=1)
        return _sample_gaussian(mean, std, keys)

    def decode(self, latents: Tensor) -> Tensor:
        """Images by the codec of ``data.vae.path``. Raises UserError if there is none."""
        if self._decoder is None:
            self._decoder = build_codec(self.config or VaeConfig(), self.device)
        return self._decoder.decode(latents)


def _sample_gaussian(mean: Tensor, std: Tensor, keys: Tensor) -> Tensor:
    return mean + std * batch_normal(keys.to(mean.device), mean.shape[1:])


def build_codec(
    config: VaeConfig | None, device: torch.device | str = "cpu", stored: StoredFacts | None = None
) -> Codec:
    """The codec of ``data.vae``, or of stored latents; pixels when there is neither.

    Raises UserError if the folder is missing, or the codec in it does not load.
    """
    latents = latents_of(stored)
    if latents is not None:
        return StoredCodec(latents, config, device)
    if config is None:
        return PixelCodec()
    codec: Codec = CODECS.get(codec_facts(config).name)(config, device)
    return codec


def vae_at(config: VaeConfig | None, path: str | None) -> VaeConfig | None:
    """``data.vae`` of a run with the folder ``path`` (--vae) in place of its own, which may be on another machine.

    Raises UserError where the run's model works on pixels, or the folder's codec has another factor.
    """
    if path is None:
        return config
    if config is None:
        raise UserError(
            f"--vae: {path}, but the run's model works on pixels, which nothing has to decode; leave it out"
        )
    config = config.model_copy(update={"path": path})
    check_vae(config)
    return config


def codec_identity(config: VaeConfig) -> str:
    """Class and SHA-256 (16 digits) of the weights at ``data.vae.path``."""
    folder = codec_folder(config)
    facts = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    digest = _weights_digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))
    return f"{read_facts(folder).name}:{digest}"


@functools.lru_cache(maxsize=16)
def _weights_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def check_vae(
    config: VaeConfig | None,
    *,
    stored: StoredFacts | None = None,
    in_channels: int | None = None,
    image_channels: int | None = None,
) -> None:
    """Raise UserError where the folder is missing, is no codec's, or disagrees with ``data.vae`` or the model.

    stored: of the data; stored latents need no folder.  in_channels: the model's.  image_channels: the data's.
    Loads nothing.
    """
    latents = latents_of(stored)
    if config is None or (config.path is None and latents is not None):
        return
    facts = codec_facts(config)
    scale_and_shift(config, facts)
    if facts.factor != config.factor:
        raise UserError(
            f"data.vae.factor: {config.factor}, but the codec in {config.path} makes one latent pixel of "
            f"{facts.factor}x{facts.factor} image pixels; set data.vae.factor={facts.factor}"
        )
    if in_channels is not None and facts.channels != in_channels:
        raise UserError(
            f"model.in_channels: {in_channels}, but the latents of {config.path} have {facts.channels} channels; "
            f"set model.in_channels={facts.channels}"
        )
    if image_channels is not None and facts.image_channels != image_channels:
        raise UserError(
            f"data.vae.path: the codec in {config.path} takes images of {facts.image_channels} channel(s), the data "
            f"have {image_channels}; choose another data set or codec"
        )
    if latents is not None and codec_identity(config) != latents.codec:
        logging.getLogger(__name__).warning(
            "data.vae.path: %s has other weights (%s) than the stored latents come from (%s); pictures may be off",
            config.path, codec_identity(config), latents.codec,
        )  # fmt: skip


def scale_and_shift(config: VaeConfig, facts: CodecFacts) -> tuple[float, float]:
    """(scale, shift) of ``data.vae``, or the codec's where null. Raises UserError where they may not differ."""
    fitted = CODECS.get(facts.name).fitted_scale
    for key, value, of_codec in (("scale", config.scale, facts.scale), ("shift", config.shift, facts.shift)):
        if fitted and value is not None and abs(value - of_codec) > 1e-6:
            raise UserError(
                f"data.vae.{key}: {value:g}, but {of_codec:g} was fitted with the codec in {config.path}; leave "
                f"data.vae.{key} out"
            )
    scale = facts.scale if config.scale is None else config.scale
    return scale, facts.shift if config.shift is None else config.shift
