"""Codecs: from images to what the model is trained on and back. Pixels as they are, or an autoencoder's latents.

A codec is given images in [-1, 1] and one key per sample, so that a sample's latent does not depend on its batch.
Which codec a folder holds is told by ``_class_name`` of its ``config.json``.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.folder import PCA_CLASS, VAE_CLASS, CodecFacts, codec_facts, codec_folder, read_facts
from megadit.data.codecs.pca import load_pca
from megadit.data.dataset import StoredFacts
from megadit.errors import UserError
from megadit.files.file_kind import other_among
from megadit.files.weight_files import check_indices
from megadit.finite import not_finite
from megadit.optional import import_diffusers
from megadit.rng import batch_normal

_PER_PASS = 16  # images through the autoencoder at once: its activations are far larger than its latents


class Codec(ABC):
    """factor: image pixels per latent pixel along a side.  channels: of the latents; None: those of the image.

    decodes: whether ``decode`` can be called, so that pictures can be drawn.
    """

    factor: int
    channels: int | None
    decodes: bool = True

    @abstractmethod
    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] and keys (B,) int64 -> latents float32 (B, c, H / factor, W / factor)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, float32 (B, C, H, W), about [-1, 1]."""


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


class VaeCodec(Codec):
    """diffusers' AutoencoderKL from a local folder with safetensors weights; frozen, float32, on ``device``.

    Latents are (z - shift) * scale, with z drawn from the encoder's Gaussian by keyed noise. ``data.vae.scale`` and
    ``shift`` that are null are the autoencoder's own.
    Raises UserError that names ``data.vae.path`` if the folder is missing, is not an AutoencoderKL or does not load.
    """

    def __init__(self, config: VaeConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        folder = codec_folder(config)
        facts = read_facts(folder)
        self.scale, self.shift = _scale_and_shift(config, facts)
        self.vae = _load(folder).to(self.device, torch.float32).eval().requires_grad_(False)
        self.factor = facts.factor
        self.channels = facts.channels
        if abs(facts.scale - self.scale) > 1e-6:
            logging.getLogger(__name__).warning(
                "data.vae.scale: %g is used, the autoencoder's own config says %g", self.scale, facts.scale
            )

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, with shift and scale applied, float32 (B, c, h, w) each.

        Raises UserError if the size or channels of ``images`` do not fit.
        """
        channels, height, width = images.shape[1:]
        if channels != self.vae.config.in_channels:
            raise UserError(
                f"data.vae.path: this autoencoder takes {self.vae.config.in_channels} channels, the images have "
                f"{channels}; choose another data set or autoencoder"
            )
        if height % self.factor or width % self.factor:
            raise UserError(
                f"data.image_size: {height}x{width} is not a multiple of {self.factor}, the autoencoder's factor; "
                "choose one that is"
            )
        found = [self.vae.encode(batch.to(self.device, torch.float32)).latent_dist for batch in images.split(_PER_PASS)]
        mean, std = torch.cat([part.mean for part in found]), torch.cat([part.std for part in found])
        return (mean - self.shift) * self.scale, std * self.scale

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Sample the posterior with each sample's own noise. Raises UserError if the size or channels do not fit."""
        return _drawn(*self.posterior(images), keys)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Undo scale and shift, then decode."""
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return torch.cat([self.vae.decode(part).sample for part in z.split(_PER_PASS)])


class PcaCodec(Codec):
    """A PCA patch codec's folder (``tools/encode.py fit-pca``). Its latents have no posterior: keys are not used.

    Raises UserError if the folder does not load, or ``data.vae.scale`` or ``shift`` is given and not the codec's own:
    these were fitted with it.
    """

    def __init__(self, config: VaeConfig, device: torch.device | str = "cpu") -> None:
        folder = codec_folder(config)
        self.scale, _ = _scale_and_shift(config, read_facts(folder))
        self.device = torch.device(device)
        self.pca = load_pca(folder).to(self.device)
        self.factor, self.channels = self.pca.factor, self.pca.channels

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """The projections of each patch, scaled. Raises UserError if the size or channels do not fit."""
        channels, height, width = images.shape[1:]
        if channels != self.pca.image_channels or height % self.factor or width % self.factor:
            raise UserError(
                f"data.vae.path: this codec takes images of {self.pca.image_channels} channel(s) and multiples of "
                f"{self.factor} pixels, not {channels} and {height}x{width}; fit one on these images"
            )
        return self.pca.encode(images.to(self.device)) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images from the components that were kept."""
        return self.pca.decode(latents.to(self.device, torch.float32) / self.scale)


class StoredCodec(Codec):
    """Latents that were encoded before: only drawn from their posterior, where that was stored.

    Decoding is that of the codec at ``data.vae.path``, loaded when the first picture is drawn; without a path
    ``decodes`` is False.
    """

    def __init__(self, stored: StoredFacts, config: VaeConfig | None, device: torch.device | str = "cpu") -> None:
        self.stored, self.config, self.device = stored, config, torch.device(device)
        self.factor, self.channels = stored.factor, stored.channels
        self.decodes = config is not None and config.path is not None
        self._decoder: Codec | None = None

    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Latents as they are, in float32; moments (B, 2c, h, w): a draw with each sample's own noise."""
        if not self.stored.moments:
            return images.float()
        mean, std = images.float().chunk(2, dim=1)
        return _drawn(mean, std, keys)

    def decode(self, latents: Tensor) -> Tensor:
        """Images by the codec of ``data.vae.path``. Raises UserError if there is none."""
        if self._decoder is None:
            self._decoder = build_codec(self.config or VaeConfig(), self.device)
        return self._decoder.decode(latents)


def _drawn(mean: Tensor, std: Tensor, keys: Tensor) -> Tensor:
    return mean + std * batch_normal(keys.to(mean.device), mean.shape[1:])


def build_codec(
    config: VaeConfig | None, device: torch.device | str = "cpu", stored: StoredFacts | None = None
) -> Codec:
    """The codec of ``data.vae``, or of stored latents; pixels when there is neither.

    Raises UserError as ``VaeCodec`` and ``PcaCodec`` do.
    """
    if stored is not None and stored.channels:
        return StoredCodec(stored, config, device)
    if config is None:
        return PixelCodec()
    return PcaCodec(config, device) if codec_facts(config).name == PCA_CLASS else VaeCodec(config, device)


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
    given = config.model_copy(update={"path": path})
    check_vae(given)
    return given


def codec_scale(config: VaeConfig) -> tuple[float, float]:
    """(scale, shift) that ``data.vae`` comes to. Raises UserError if the folder is no codec's, or it contradicts."""
    return _scale_and_shift(config, codec_facts(config))


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

    stored: what the data hold; latents need no folder.  in_channels: the model's.  image_channels: the data's.
    Loads nothing.
    """
    if config is None or (config.path is None and stored is not None and stored.channels):
        return
    facts = codec_facts(config)
    _scale_and_shift(config, facts)
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
    if stored is not None and stored.channels and codec_identity(config) != stored.codec:
        logging.getLogger(__name__).warning(
            "data.vae.path: %s has other weights (%s) than the stored latents come from (%s); pictures may be off",
            config.path, codec_identity(config), stored.codec,
        )  # fmt: skip


def _scale_and_shift(config: VaeConfig, facts: CodecFacts) -> tuple[float, float]:
    for key, given, own in (("scale", config.scale, facts.scale), ("shift", config.shift, facts.shift)):
        if facts.name == PCA_CLASS and given is not None and abs(given - own) > 1e-6:
            raise UserError(
                f"data.vae.{key}: {given:g}, but {own:g} was fitted with the codec in {config.path}; leave "
                f"data.vae.{key} out"
            )
    scale = facts.scale if config.scale is None else config.scale
    return scale, facts.shift if config.shift is None else config.shift


def _load(folder: Path) -> Any:
    vae_class = import_diffusers().AutoencoderKL
    check_indices(folder, ".safetensors")
    try:
        vae = vae_class.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever diffusers, safetensors or torch say about a damaged folder
        reason = " ".join(str(error).split())[:200]
        reason = other_among([folder / "config.json", *sorted(folder.glob("*.safetensors"))]) or reason
        raise UserError(
            f"data.vae.path: {folder} does not load as an {VAE_CLASS} ({reason}); fetch it again"
        ) from error
    problem = not_finite(vae.state_dict().items())
    if problem:
        raise UserError(f"data.vae.path: of the weights in {folder}, {problem}; latents would be NaN: fetch it again")
    return vae
