"""Whether data and model fit together, told before training in the words of the configuration."""

from __future__ import annotations

from megadit.config import RunConfig
from megadit.config.schema.data import VaeConfig
from megadit.data.codecs.codec import check_vae, codec_facts
from megadit.data.dataset import DatasetFacts, StoredFacts
from megadit.errors import UserError


def check_against_model(facts: DatasetFacts, config: RunConfig) -> None:
    """Raise ``UserError`` when the model's channels, size or classes are not those of the data."""
    if facts.stored is not None and facts.stored.channels:
        _check_stored_latents(facts, facts.stored, config)
    elif config.data.vae is None:
        _check_pixels(facts, config)
    else:
        _check_latents(facts, config.data.vae, config)
    _check_classes(facts, config)


def check_codec(facts: DatasetFacts, config: RunConfig) -> None:
    """Raise ``UserError`` when the codec of ``data.vae`` is not there, or not one for these data and this model."""
    stored = facts.stored is not None and facts.stored.channels > 0
    check_vae(
        config.data.vae,
        stored=facts.stored,
        in_channels=config.model.in_channels,
        image_channels=None if stored else facts.channels,
    )


def with_stored_codec(facts: DatasetFacts, config: RunConfig) -> RunConfig:
    """``config`` with scale, shift and factor of stored latents in ``data.vae``, so that a run directory tells how its
    model's latents become pictures; unchanged for other data.
    """
    stored = facts.stored
    if stored is None or not stored.channels:
        return config
    given = config.data.vae or VaeConfig()
    whole = given.model_copy(update={"scale": stored.scale, "shift": stored.shift, "factor": stored.factor})
    return config.model_copy(update={"data": config.data.model_copy(update={"vae": whole})})


def missing_decoder_note(facts: DatasetFacts, config: RunConfig) -> str | None:
    """What to tell where stored latents come without the codec that makes pictures of them; else None."""
    if facts.stored is None or not facts.stored.channels or (config.data.vae and config.data.vae.path):
        return None
    return (
        f"no pictures will be drawn: {facts.name} holds latents of {facts.stored.codec}, and data.vae.path is not "
        "given; launch/sample.py RUN_DIR --vae PATH draws them at any later time"
    )


def _check_pixels(facts: DatasetFacts, config: RunConfig) -> None:
    _check_model_key(config, "in_channels", facts.channels, f"{facts.name} has images of {facts.channels} channel(s)")
    told = f"data.image_size of {facts.name} is {facts.image_size}"
    _check_model_key(config, "input_size", facts.image_size, told, "make them equal")


def _check_latents(facts: DatasetFacts, vae: VaeConfig, config: RunConfig) -> None:
    model, factor = config.model, vae.factor
    if facts.channels != 3 and not _takes(vae, facts.channels):
        raise UserError(f"data.vae: encodes RGB images, but {facts.name} is grey; remove data.vae or use another set")
    if facts.image_size % factor:
        raise UserError(
            f"data.image_size: {facts.image_size} is not a multiple of {factor}, which data.vae needs; "
            f"set data.image_size={factor * model.input_size}"
        )
    size = facts.image_size // factor
    told = f"data.vae turns images of {facts.image_size} pixels into latents of {size}"
    remedy = f"set model.input_size={size} or data.image_size={factor * model.input_size}"
    _check_model_key(config, "input_size", size, told, remedy)


def _takes(vae: VaeConfig, channels: int) -> bool:
    try:
        return codec_facts(vae).image_channels == channels
    except UserError:  # check_codec tells what is wrong with the folder
        return False


def _check_stored_latents(facts: DatasetFacts, stored: StoredFacts, config: RunConfig) -> None:
    data, whose = config.data, f"the stored latents of {facts.name}"
    _check_model_key(config, "in_channels", stored.channels, f"{whose} have {stored.channels} channels")
    _check_model_key(config, "input_size", stored.size, f"{whose} have {stored.size} pixels a side")
    if data.image_size not in (None, facts.image_size):
        raise UserError(
            f"data.image_size: {data.image_size}, but {whose} are of images of {facts.image_size} pixels; leave "
            "data.image_size out, or encode the images again"
        )
    if data.flip and not stored.mirrored:
        raise UserError(
            f"data.flip: true, but {facts.name} holds no latents of mirrored images, which are not mirrored latents; "
            "set data.flip=false, or encode the images again with data.flip=true"
        )
    if data.vae is None:
        return
    for key, theirs in (("scale", stored.scale), ("shift", stored.shift), ("factor", stored.factor)):
        own = getattr(data.vae, key)
        if own is not None and abs(own - theirs) > 1e-6:
            raise UserError(
                f"data.vae.{key}: {own:g}, but {whose} were made with {theirs:g}; set data.vae.{key}={theirs:g}, or "
                "encode the images again"
            )


def _check_classes(facts: DatasetFacts, config: RunConfig) -> None:
    """The configuration has held ``data.condition`` against ``model.num_classes`` already; here the data decide."""
    count = facts.num_classes
    told = f"{facts.name} has {count} class{'' if count == 1 else 'es'}"
    _check_model_key(config, "num_classes", count, told)


def _check_model_key(config: RunConfig, key: str, wanted: int, told: str, remedy: str | None = None) -> None:
    """Raise ``UserError`` when ``model.<key>`` is not ``wanted``; ``told`` says what of the data asks for it."""
    own = getattr(config.model, key)
    if own != wanted:
        raise UserError(f"model.{key}: {own}, but {told}; {remedy or f'set model.{key}={wanted}'}")
