"""Whether data and model fit together. Messages name the keys of the configuration."""

from __future__ import annotations

from megadit.config import RunConfig
from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.codec import check_vae, codec_facts
from megadit.data.dataset import DatasetFacts, StoredFacts, latents_of
from megadit.errors import UserError


def check_against_model(facts: DatasetFacts, config: RunConfig) -> None:
    """Raise ``UserError`` when the model's channels, size or classes are not those of the data."""
    latents = latents_of(facts.stored)
    if latents is not None:
        _check_stored_latents(facts, latents, config)
    elif config.data.vae is None:
        _check_pixels(facts, config)
    else:
        _check_latents(facts, config.data.vae, config)
    _check_classes(facts, config)


def check_codec(facts: DatasetFacts, config: RunConfig) -> None:
    """Raise ``UserError`` when the codec of ``data.vae`` is missing, or does not fit these data and this model."""
    image_channels = None if latents_of(facts.stored) else facts.channels
    check_vae(config.data.vae, stored=facts.stored, in_channels=config.model.in_channels, image_channels=image_channels)


def with_stored_codec(facts: DatasetFacts, config: RunConfig) -> RunConfig:
    """``config`` with scale, shift and factor of stored latents in ``data.vae``, so that a run directory holds all that
    decoding its samples needs; unchanged for other data.
    """
    stored = latents_of(facts.stored)
    if stored is None:
        return config
    values = {"scale": stored.scale, "shift": stored.shift, "factor": stored.factor}
    vae = (config.data.vae or VaeConfig()).model_copy(update=values)
    return config.model_copy(update={"data": config.data.model_copy(update={"vae": vae})})


def missing_decoder_note(facts: DatasetFacts, config: RunConfig) -> str | None:
    """A note where stored latents come without the codec that decodes them; else None."""
    latents = latents_of(facts.stored)
    if latents is None or (config.data.vae and config.data.vae.path):
        return None
    return (
        f"no pictures will be drawn: {facts.name} holds latents of {latents.codec}, and data.vae.path is not "
        "given; launch/sample.py RUN_DIR --vae PATH draws them at any later time"
    )


def _check_pixels(facts: DatasetFacts, config: RunConfig) -> None:
    _check_model_key(config, "in_channels", facts.channels, f"{facts.name} has images of {facts.channels} channel(s)")
    reason = f"data.image_size of {facts.name} is {facts.image_size}"
    _check_model_key(config, "input_size", facts.image_size, reason, "make them equal")


def _check_latents(facts: DatasetFacts, vae: VaeConfig, config: RunConfig) -> None:
    model, factor = config.model, vae.factor
    if facts.channels != 3 and not _codec_encodes(vae, facts.channels):
        raise UserError(f"data.vae: encodes RGB images, but {facts.name} is grey; remove data.vae or use another set")
    if facts.image_size % factor:
        raise UserError(
            f"data.image_size: {facts.image_size} is not a multiple of {factor}, which data.vae needs; "
            f"set data.image_size={factor * model.input_size}"
        )
    size = facts.image_size // factor
    reason = f"data.vae turns images of {facts.image_size} pixels into latents of {size}"
    remedy = f"set model.input_size={size} or data.image_size={factor * model.input_size}"
    _check_model_key(config, "input_size", size, reason, remedy)


def _codec_encodes(vae: VaeConfig, channels: int) -> bool:
    try:
        return codec_facts(vae).image_channels == channels
    except UserError:  # check_codec reports what is wrong with the folder
        return False


def _check_stored_latents(facts: DatasetFacts, stored: StoredFacts, config: RunConfig) -> None:
    data, latents = config.data, f"the stored latents of {facts.name}"
    _check_model_key(config, "in_channels", stored.channels, f"{latents} have {stored.channels} channels")
    _check_model_key(config, "input_size", stored.size, f"{latents} have {stored.size} pixels a side")
    if data.image_size not in (None, facts.image_size):
        raise UserError(
            f"data.image_size: {data.image_size}, but {latents} are of images of {facts.image_size} pixels; leave "
            "data.image_size out, or encode the images again"
        )
    if data.flip and not stored.mirrored:
        raise UserError(
            f"data.flip: true, but {facts.name} holds no latents of mirrored images, which are not mirrored latents; "
            "set data.flip=false, or encode the images again with data.flip=true"
        )
    if data.vae is None:
        return
    for key in ("scale", "shift", "factor"):
        value, expected = getattr(data.vae, key), getattr(stored, key)
        if value is not None and abs(value - expected) > 1e-6:
            raise UserError(
                f"data.vae.{key}: {value:g}, but {latents} were made with {expected:g}; set data.vae.{key}="
                f"{expected:g}, or encode the images again"
            )


def _check_classes(facts: DatasetFacts, config: RunConfig) -> None:
    """``model.num_classes`` against the data; the configuration has compared it with ``data.condition`` already."""
    count = facts.num_classes
    _check_model_key(config, "num_classes", count, f"{facts.name} has {count} class{'' if count == 1 else 'es'}")


def _check_model_key(config: RunConfig, key: str, expected: int, reason: str, remedy: str | None = None) -> None:
    """Raise ``UserError`` when ``model.<key>`` is not ``expected``; ``reason``: the property of the data behind it."""
    value = getattr(config.model, key)
    if value != expected:
        raise UserError(f"model.{key}: {value}, but {reason}; {remedy or f'set model.{key}={expected}'}")
