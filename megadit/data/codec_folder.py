"""A codec's folder without its weights: whether it is one, and what its ``config.json`` says. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megadit.config.data import VaeConfig
from megadit.config.json_text import JsonError, parse_json
from megadit.errors import UserError

VAE_CLASS = "AutoencoderKL"
PCA_CLASS = "PcaPatchCodec"


@dataclass(frozen=True)
class CodecFacts:
    """What a codec's ``config.json`` says."""

    name: str
    factor: int
    channels: int
    image_channels: int
    scale: float
    shift: float


def codec_facts(config: VaeConfig) -> CodecFacts:
    """What is known of the codec at ``data.vae.path`` without its weights. Raises UserError if it is no codec's."""
    return read_facts(codec_folder(config))


def codec_folder(config: VaeConfig) -> Path:
    """The folder at ``data.vae.path``. Raises UserError if it is missing or no codec's."""
    if config.path is None:
        raise UserError(
            f"data.vae.path: is missing; give the folder of a diffusers {VAE_CLASS} on this machine (sample.py: --vae)"
        )
    folder = Path(config.path)
    _check(folder)
    return folder


def read_facts(folder: Path) -> CodecFacts:
    """What the ``config.json`` of a codec's folder says. Raises UserError if that is not enough."""
    values = parse_json((folder / "config.json").read_bytes())
    try:
        if values["_class_name"] == PCA_CLASS:
            factor, channels, of_images = values["factor"], values["channels"], values["image_channels"]
        else:
            blocks = len(values.get("block_out_channels", (64,)))  # these three defaults are AutoencoderKL's own
            factor, channels = 2 ** (blocks - 1), values.get("latent_channels", 4)
            of_images = values.get("in_channels", 3)
        scale, shift = values.get("scaling_factor", 0.18215), values.get("shift_factor") or 0.0
        name = str(values["_class_name"])
        return CodecFacts(name, int(factor), int(channels), int(of_images), float(scale), float(shift))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data.vae.path: {folder / 'config.json'} does not describe a codec ({error!r}); fetch it again"
        ) from error


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"data.vae.path: {folder} is not a folder; give the folder of a diffusers {VAE_CLASS} on this machine"
        )
    config = folder / "config.json"
    if not config.is_file():
        inner = " (a pipeline: give its folder vae)" if (folder / "vae" / "config.json").is_file() else ""
        raise UserError(
            f"data.vae.path: {folder} has no config.json{inner}; give the folder of a diffusers {VAE_CLASS}"
        )
    try:
        name = parse_json(config.read_bytes()).get("_class_name")
    except (JsonError, AttributeError) as error:
        raise UserError(f"data.vae.path: {config} is not a JSON object ({error}); fetch it again") from error
    if name not in (VAE_CLASS, PCA_CLASS):
        raise UserError(f"data.vae.path: {folder} holds a {name}, not an {VAE_CLASS}; give an {VAE_CLASS} folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"data.vae.path: {folder} has no .safetensors weights; convert or fetch them in that format")
