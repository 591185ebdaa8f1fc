"""``AutoencoderKL``: the variational autoencoder of diffusers, from a local folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.codec import GaussianCodec, scale_and_shift
from megadit.data.codecs.folder import VAE_CLASS, codec_folder, read_facts
from megadit.errors import UserError, one_line
from megadit.files.file_kind import other_among
from megadit.files.weight_files import check_indices
from megadit.finite import describe_nonfinite
from megadit.optional import import_diffusers

_PER_PASS = 16  # images through the autoencoder at once: its activations are far larger than its latents


class VaeCodec(GaussianCodec):
    """diffusers' AutoencoderKL from a local folder with safetensors weights; frozen, float32, on ``device``.

    Latents are (z - shift) * scale, with z sampled from the encoder's Gaussian by keyed noise. ``data.vae.scale`` and
    ``shift`` default to the autoencoder's own.
    Raises UserError that names ``data.vae.path`` if the folder is missing, is not an AutoencoderKL or does not load.
    """

    def __init__(self, config: VaeConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        folder = codec_folder(config)
        facts = read_facts(folder)
        self.scale, self.shift = scale_and_shift(config, facts)
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
        parts = [self.vae.encode(batch.to(self.device, torch.float32)).latent_dist for batch in images.split(_PER_PASS)]
        mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
        return (mean - self.shift) * self.scale, std * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Undo scale and shift, then decode."""
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return torch.cat([self.vae.decode(part).sample for part in z.split(_PER_PASS)])


def _load(folder: Path) -> Any:
    vae_class = import_diffusers().AutoencoderKL
    check_indices(folder, ".safetensors")
    try:
        vae = vae_class.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever diffusers, safetensors or torch say about a damaged folder
        reason = other_among([folder / "config.json", *sorted(folder.glob("*.safetensors"))]) or one_line(error)
        raise UserError(
            f"data.vae.path: {folder} does not load as an {VAE_CLASS} ({reason}); fetch it again"
        ) from error
    problem = describe_nonfinite(vae.state_dict().items())
    if problem:
        raise UserError(f"data.vae.path: of the weights in {folder}, {problem}; latents would be NaN: fetch it again")
    return vae
