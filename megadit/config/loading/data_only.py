"""The ``data`` section alone, for commands that prepare data and train no model."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from megadit.config.base import Section
from megadit.config.loading.loader import load_config
from megadit.config.loading.merge import merge
from megadit.config.loading.sources import find_config, nested, override_layer, read_layers
from megadit.config.messages import explain
from megadit.config.schema.data import DataConfig
from megadit.config.schema.reads import settle
from megadit.config.schema.run import RunConfig
from megadit.errors import UserError


class _DataOnly(Section):
    data: DataConfig = DataConfig()


def load_data(path: str | None, overrides: Sequence[str]) -> DataConfig:
    """``data`` of the file at ``path`` (None: the defaults) with ``overrides`` of ``data.*`` laid over it.

    No model has to fit: image sizes and classes are free. Raises UserError as ``load`` does, and for overrides of other
    sections, which would change nothing.
    """
    other = next((text for text in overrides if not text.strip().startswith(("data.", "data="))), None)
    if other is not None:
        raise UserError(f"override: {other!r} changes nothing here; only data.* keys are read")
    layers = read_layers(find_config(path)) if path is not None else []
    merged = merge([*layers, override_layer(overrides)], RunConfig)
    settle(merged.values, merged.sources, merged.order, merged.resolved, only="data.")
    values = {key: value for key, value in merged.values.items() if key.split(".")[0] == "data"}
    try:
        return _DataOnly.model_validate(nested(values)).data
    except ValidationError as error:
        raise UserError(explain(error, _DataOnly, merged.sources)) from None


def text_length(path: str | None) -> int | None:
    """``model.text.max_length`` of the configuration at ``path``; None without one, or where the model takes no text.

    Raises UserError as ``load_config`` does.
    """
    if path is None:
        return None
    text = load_config(path).model.text
    return None if text is None else text.max_length
