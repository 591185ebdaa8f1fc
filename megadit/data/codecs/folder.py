"""A codec's folder: its checks, and the facts in its ``config.json``. Reads no weights and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megadit.config.schema.data import VaeConfig
from megadit.errors import UserError
from megadit.extensions import CODECS
from megadit.files.file_kind import refuse_broken
from megadit.files.folder_kind import broken_link, snapshot_of
from megadit.files.json_fields import Fields, shown

VAE_CLASS = "AutoencoderKL"
_KEY = "data.vae.path"
_MOST_LEVELS = 16  # of an autoencoder; published ones have 4 or 5
_MOST = 2**16  # channels, and pixels of a patch
_MOST_LAYERS, _MOST_WIDTH = 64, 2**13  # of a level: diffusers builds that much before it looks at the weights
_PER_CHANNEL = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class CodecFacts:
    """The ``config.json`` of a codec.

    name: its ``_class_name``.  factor: image pixels per latent pixel along a side.  channels: of latents.
    image_channels: of the images that it encodes.  scale, shift: latents are (z - shift) * scale, with z the output of
    its encoder.
    """

    name: str
    factor: int
    channels: int
    image_channels: int
    scale: float
    shift: float


def codec_facts(config: VaeConfig) -> CodecFacts:
    """The facts of the codec at ``data.vae.path``; reads no weights. Raises UserError if it is no codec's folder."""
    return read_facts(codec_folder(config))


def codec_folder(config: VaeConfig) -> Path:
    """The folder at ``data.vae.path``. Raises UserError if it is missing or no codec's."""
    if config.path is None:
        raise UserError(
            f"{_KEY}: is missing; give the folder of a diffusers {VAE_CLASS} on this machine (sample.py: --vae)"
        )
    folder = Path(config.path)
    _check(folder)
    return folder


def read_facts(folder: Path, key: str = _KEY) -> CodecFacts:
    """The facts in the ``config.json`` of a codec's folder; an unknown class is read as an AutoencoderKL.

    ``key``: the option that names the folder, for messages.

    Raises:
        UserError: it cannot be read, a value is none of its type, or latents are scaled by a number per channel.
    """
    fields = Fields.of_file(folder / "config.json", key, "fetch it again")
    name = fields.text("_class_name")
    if name in CODECS and name != VAE_CLASS:
        factor, channels = (fields.integer(part, least=1, most=_MOST) for part in ("factor", "channels"))
        of_images = fields.integer("image_channels", least=1, most=_MOST)
        scale = fields.number("scaling_factor", above=0.0)
    else:
        factor = 2 ** (_levels(fields) - 1)
        _check_other_fields(fields)
        channels = fields.integer("latent_channels", 4, least=1, most=_MOST)  # the defaults are AutoencoderKL's own
        of_images = fields.integer("in_channels", 3, least=1, most=_MOST)
        scale = fields.number("scaling_factor", 0.18215, above=0.0)
        for part in _PER_CHANNEL:
            if fields.raw(part) is not None:
                raise UserError(
                    f"{fields.where} has {part} {shown(fields.raw(part))}: its latents are scaled by a number per "
                    "channel, which is not known here; give another autoencoder"
                )
    shift = fields.number("shift_factor", None, null=True)
    return CodecFacts(name, factor, channels, of_images, scale, shift or 0.0)


def _levels(fields: Fields) -> int:
    """The number of resolutions of an AutoencoderKL, each half of the one before; checks the keys it follows from."""
    blocks = fields.items("block_out_channels", (64,))
    sizes = fields.elements("block_out_channels", (64,))
    if not 1 <= len(blocks) <= _MOST_LEVELS:
        raise fields.refused("block_out_channels", blocks, f"a list of 1 to {_MOST_LEVELS} numbers")
    for part in sizes.names():
        sizes.integer(part, least=1, most=_MOST_WIDTH)
    fields.integer("layers_per_block", 1, least=1, most=_MOST_LAYERS)
    for part in ("down_block_types", "up_block_types"):  # all but the last of the channels halve the resolution
        kinds = fields.items(part, ("",))
        if len(kinds) not in (len(blocks), len(blocks) - 1):
            raise fields.refused(part, kinds, f"as many as the {len(blocks)} block_out_channels")
        named = fields.elements(part, ("",))
        for kind in named.names():
            named.text(kind)
    groups = fields.integer("norm_num_groups", 32, least=1, most=_MOST_WIDTH)
    uneven = next((size for size in blocks if size % groups), None)
    if uneven is not None and "norm_num_groups" in fields:
        raise fields.refused(
            "norm_num_groups", groups, f"a divisor of all block_out_channels, of which {uneven} is one"
        )
    return len(blocks)


def _check_other_fields(fields: Fields) -> None:
    """Refuse values of an AutoencoderKL that are not of their type, before diffusers builds with them."""
    fields.integer("out_channels", 3, least=1, most=_MOST)
    fields.text("act_fn", "silu")
    for part in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        fields.flag(part, True)


def _check(folder: Path) -> None:
    """Refuse a folder without a codec's ``config.json`` and whole safetensors weights. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{_KEY}: {folder} is not a folder; give the folder of a diffusers {VAE_CLASS} on this machine")
    config = folder / "config.json"
    wrong = broken_link(config)
    if wrong is not None:
        raise UserError(f"{_KEY}: '{config}' {wrong}")
    if not config.is_file():
        cache = snapshot_of(folder)
        if cache is not None:
            raise UserError(f"{_KEY}: '{folder}' {cache}, or its folder vae")
        inner = " (a pipeline: give its folder vae)" if (folder / "vae" / "config.json").is_file() else ""
        raise UserError(f"{_KEY}: {folder} has no config.json{inner}; give the folder of a diffusers {VAE_CLASS}")
    name = Fields.of_file(config, _KEY, "fetch it again").raw("_class_name")
    if name not in CODECS:
        model = name if isinstance(name, str) else f"model with _class_name {shown(name)}"
        raise UserError(f"{_KEY}: {folder} holds a {model}, not an {VAE_CLASS}; give an {VAE_CLASS} folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{_KEY}: {folder} has no .safetensors weights; convert or fetch them in that format")
    refuse_broken(_KEY, weights)
