"""Codecs: from images to what the model is trained on and back. Pixels as they are, or an autoencoder's latents.

A codec is given images in [-1, 1] and one key per sample, so that a sample's latent does not depend on its batch.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.config.data import VaeConfig
from megadit.errors import UserError
from megadit.optional import import_diffusers
from megadit.rng import batch_normal

_CLASS = "AutoencoderKL"
_PER_PASS = 16  # images through the autoencoder at once: its activations are far larger than its latents


class Codec(ABC):
    """factor: image pixels per latent pixel along a side.  channels: of the latents; None: those of the image."""

    factor: int
    channels: int | None

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

    Latents are (z - shift) * scale, with z drawn from the encoder's Gaussian by keyed noise.
    Raises UserError that names ``data.vae.path`` if the folder is missing, is not an AutoencoderKL or does not load.
    """

    def __init__(self, config: VaeConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.vae = _load(_folder(config)).to(self.device, torch.float32).eval().requires_grad_(False)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.channels = int(self.vae.config.latent_channels)
        own = self.vae.config.scaling_factor
        if abs(own - config.scale) > 1e-6:
            logging.getLogger(__name__).warning(
                "data.vae.scale: %g is used, the autoencoder's own config says %g", config.scale, own
            )

    @torch.no_grad()
    def encode(self, images: Tensor, keys: Tensor) -> Tensor:
        """Sample the posterior with each sample's own noise. Raises UserError if the size or channels do not fit."""
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
        parts = []
        for batch, part_keys in zip(images.split(_PER_PASS), keys.split(_PER_PASS), strict=True):
            posterior = self.vae.encode(batch.to(self.device, torch.float32)).latent_dist
            noise = batch_normal(part_keys.to(self.device), posterior.mean.shape[1:])
            parts.append(posterior.mean + posterior.std * noise)
        return (torch.cat(parts) - self.config.shift) * self.config.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Undo scale and shift, then decode."""
        z = latents.to(self.device, torch.float32) / self.config.scale + self.config.shift
        return torch.cat([self.vae.decode(part).sample for part in z.split(_PER_PASS)])


def build_codec(config: VaeConfig | None, device: torch.device | str = "cpu") -> Codec:
    """The codec of ``data.vae``; pixels when there is none. Raises UserError as ``VaeCodec`` does."""
    return PixelCodec() if config is None else VaeCodec(config, device)


def check_vae(config: VaeConfig | None) -> None:
    """Raise UserError, as ``VaeCodec`` does, where the folder is missing or is no autoencoder's; loads nothing."""
    if config is not None:
        _folder(config)


def _folder(config: VaeConfig) -> Path:
    if config.path is None:
        raise UserError(f"data.vae.path: is missing; give the folder of a diffusers {_CLASS} on this machine")
    folder = Path(config.path)
    _check(folder)
    return folder


def _load(folder: Path) -> Any:
    vae_class = import_diffusers().AutoencoderKL
    try:
        return vae_class.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever diffusers, safetensors or torch say about a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data.vae.path: {folder} does not load as an {_CLASS} ({reason}); fetch it again") from error


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"data.vae.path: {folder} is not a folder; give the folder of a diffusers {_CLASS} on this machine"
        )
    config = folder / "config.json"
    if not config.is_file():
        inner = " (a pipeline: give its folder vae)" if (folder / "vae" / "config.json").is_file() else ""
        raise UserError(f"data.vae.path: {folder} has no config.json{inner}; give the folder of a diffusers {_CLASS}")
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"data.vae.path: {config} is not a JSON object; fetch the autoencoder again") from error
    if name != _CLASS:
        raise UserError(f"data.vae.path: {folder} holds a {name}, not an {_CLASS}; give an {_CLASS} folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"data.vae.path: {folder} has no .safetensors weights; convert or fetch them in that format")
