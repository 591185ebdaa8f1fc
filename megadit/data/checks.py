"""Whether data and model fit together, told before training in the words of the configuration."""

from __future__ import annotations

from megadit.config import RunConfig
from megadit.data.dataset import DatasetFacts
from megadit.errors import UserError

VAE_FACTOR = 8  # image pixels per latent pixel, along a side


def check_against_model(facts: DatasetFacts, config: RunConfig) -> None:
    """Raise ``UserError`` when the model's channels, size or classes are not those of the data."""
    if config.data.vae is None:
        _check_pixels(facts, config)
    else:
        _check_latents(facts, config)
    _check_classes(facts, config)


def _check_pixels(facts: DatasetFacts, config: RunConfig) -> None:
    model = config.model
    if model.in_channels != facts.channels:
        raise UserError(
            f"model.in_channels: {model.in_channels}, but {facts.name} has images of {facts.channels} channel(s); "
            f"set model.in_channels={facts.channels}"
        )
    if model.input_size != facts.image_size:
        raise UserError(
            f"model.input_size: {model.input_size}, but data.image_size of {facts.name} is {facts.image_size}; "
            "make them equal"
        )


def _check_latents(facts: DatasetFacts, config: RunConfig) -> None:
    model = config.model
    if facts.channels != 3:
        raise UserError(f"data.vae: encodes RGB images, but {facts.name} is grey; remove data.vae or use another set")
    if facts.image_size % VAE_FACTOR:
        raise UserError(
            f"data.image_size: {facts.image_size} is not a multiple of {VAE_FACTOR}, which data.vae needs; "
            f"set data.image_size={VAE_FACTOR * model.input_size}"
        )
    if model.input_size != facts.image_size // VAE_FACTOR:
        raise UserError(
            f"model.input_size: {model.input_size}, but data.vae turns images of {facts.image_size} pixels into "
            f"latents of {facts.image_size // VAE_FACTOR}; set model.input_size={facts.image_size // VAE_FACTOR} "
            f"or data.image_size={VAE_FACTOR * model.input_size}"
        )


def _check_classes(facts: DatasetFacts, config: RunConfig) -> None:
    """The configuration has held ``data.condition`` against ``model.num_classes`` already; here the data decide."""
    if config.model.num_classes != facts.num_classes:
        raise UserError(
            f"model.num_classes: {config.model.num_classes}, but {facts.name} has {facts.num_classes} classes; "
            f"set model.num_classes={facts.num_classes}"
        )
