"""The run configuration of a model that came without one, and whether a given one is of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megadit.config.schema.model import ModelConfig
from megadit.config.schema.run import RunConfig
from megadit.errors import UserError
from megadit.models.conversion import LATENT_CHANNELS, conversion_of

# What a model's weights say nothing of: how it began and how its layers are computed.
_FREE = {"init", "adaln_init", "attention_precision", "norm_precision", "role_hps", "heads", "head_dim", "repa"}


def default_run(
    model: ModelConfig, overrides: Sequence[str] = (), known: Mapping[str, Mapping[str, Any]] | None = None
) -> RunConfig:
    """A configuration that samples from ``model`` and trains on, with ``overrides`` (``data.path=…``) laid over it.

    ``known`` holds what the checkpoint says of other sections. What it does not say is a default: the objective and
    the guidance of the family's originals (``Conversion.defaults``), and an autoencoder of factor 8 for 4 and 16
    channels, whose folder only the user knows (``data.vae.path``).

    Raises:
        UserError: an override is wrong.
    """
    from megadit.config.loading.loader import load_layers
    from megadit.config.loading.sources import ConfigLayer, override_layer

    known = known or {}
    condition = "class" if model.num_classes else "none" if model.text is None else "text"
    data: dict[str, Any] = {"name": "image-folder", "condition": condition}
    if model.in_channels in LATENT_CHANNELS:
        data["vae"] = {"path": None}  # for its user to name; scale and shift are its own
    sections: dict[str, dict[str, Any]] = {
        **conversion_of(model.family).defaults(model),
        "data": data,
        "train": {"steps": 100_000},
    }
    if condition == "none":
        sections["sample"]["guidance"] = 1.0
    for section, values in known.items():
        sections[section] = {**sections.get(section, {}), **values}
    layers = [ConfigLayer({"model": model.model_dump(), **sections}, "the defaults of a converted model")]
    return load_layers([*layers, override_layer(overrides)])


def check_config_model(config: ModelConfig, model: ModelConfig, description: str) -> None:
    """Refuse a ``--config`` of another model than the one in the file ``description``.

    Raises:
        UserError: naming the first keys that differ, with both values.
    """
    stored, configured = _keys_of_weights(model), _keys_of_weights(config)
    keys = [key for key in stored if stored[key] != configured[key]]
    pairs = [(f"model.{key}", stored[key], configured[key]) for key in keys]
    if model.num_heads != config.num_heads:
        pairs.append(("model.heads", model.num_heads, config.num_heads))
    if config.repa is not None:
        pairs.append(("model.repa", "none", "a projector"))
    pairs += [
        (f"model.role_hps.{role}.mult", 1.0, getattr(config.role_hps, role).mult)
        for role in type(config.role_hps).model_fields
        if getattr(config.role_hps, role).mult != 1.0
    ]
    if not pairs:
        return
    shown = ", ".join(f"{key} is {a} in the file and {b} in --config" for key, a, b in pairs[:4])
    more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
    remedy = "make --config agree"
    if any(key == "model.parametrization" for key, _, _ in pairs):
        remedy += ", or say with --hint parametrization=mup that the readout's multiplier is not in the weights"
    raise UserError(f"{description}: is of another model: {shown}{more}; {remedy}")


def _keys_of_weights(model: ModelConfig) -> dict[str, Any]:
    """The keys of a model section that its weights determine, with their values."""
    keys = {key: value for key, value in model.model_dump(mode="json").items() if key not in _FREE}
    if keys["text"] is not None:
        keys["text"] = {**keys["text"], "mask": None}
    return conversion_of(model.family).comparable_keys(model, keys)
