"""Loads, changes and saves run configurations: ``load_config``, ``load``, ``replace``, ``save_config``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megadit.config.loading.layers import MergedLayers, merge
from megadit.config.loading.messages import validated
from megadit.config.loading.sources import RESOLVED, ConfigLayer, configs_dir, find_config, override_layer, read_layers
from megadit.config.schema.data import DataConfig
from megadit.config.schema.reads import drop_unread
from megadit.config.schema.run import RunConfig
from megadit.config.schema.section import Section
from megadit.errors import UserError
from megadit.files.paths import atomic_write
from megadit.files.yaml_text import dump_yaml
from megadit.nested import unflatten
from megadit.plugins import load_plugins, loaded_plugins, plugin_records, require_imported

QUICKSTART = "quickstart/emoji.yaml"  # runs when no --config is given


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where its values come from.

    ``user_set``: source (``configs/dit/xl-2.yaml``, ``an override``) of each dotted key that the user set, in a file
    they named or by an override. The quickstart that runs without ``--config`` counts as defaults, which a ds_config
    may overrule. ``resolved``: those keys of ``user_set`` whose source is a file that megadit wrote with every key, so
    that the user did not choose each.
    """

    config: RunConfig
    user_set: Mapping[str, str] = field(default_factory=dict)
    source: str = "defaults"
    resolved: frozenset[str] = frozenset()


def load(path: str | Path | None = None, overrides: Sequence[str] = (), *, may_import: bool = False) -> LoadedConfig:
    """Read the file at ``path`` (None: the quickstart) with its bases, apply ``overrides`` and validate the result.

    ``may_import``: import the plugins that the file names, unless megadit wrote it. Raises UserError that names every
    wrong key with its value, source and remedy.
    """
    file = find_config(path) if path is not None else configs_dir() / QUICKSTART
    layers = read_layers(file)
    if may_import and not layers[-1].resolved:
        named = plugin_records(layers[-1].values.get("plugins") or [])
        load_plugins((record["name"] for record in named), f"plugins in {layers[-1].source}")
    require_plugins(layers)
    defaults = {layer.source for layer in layers} if path is None else set()
    merged = merge([*layers, override_layer(overrides)], RunConfig)
    config = _validated(merged)
    user_set = {key: source for key, source in merged.sources.items() if source not in defaults}
    name = layers[-1].source + (" (the quickstart)" if path is None else "")
    if overrides:
        name += f" with {len(overrides)} override{'s' if len(overrides) > 1 else ''}"
    return LoadedConfig(config, user_set, name, merged.resolved)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """``load(path, overrides).config``, the validated configuration. Raises UserError."""
    return load(path, overrides).config


def load_layers(layers: Sequence[ConfigLayer]) -> RunConfig:
    """The validated configuration of ``layers``, the first is the lowest. Raises UserError."""
    require_plugins(layers)
    return _validated(merge(layers, RunConfig))


def replace(
    config: RunConfig, changes: Mapping[str, Any], source: str = "a change", *, resolved: bool = False
) -> RunConfig:
    """``config`` with dotted ``changes`` (``{"model.width": 256, "optim.lr": 2e-4}``), validated again.

    ``source``: the origin of the changes in error messages; ``resolved``: they come from another complete
    configuration, so that a key among them that nothing reads is no error. Raises UserError.
    """
    before = ConfigLayer(config.model_dump(), "the configuration", resolved=True)
    return _validated(merge([before, ConfigLayer(unflatten(changes), source, resolved)], RunConfig))


def require_plugins(layers: Sequence[ConfigLayer]) -> None:
    """Raise UserError where ``layers`` name plugins that are not imported, before their values are interpreted."""
    for layer in layers:
        require_imported(plugin_records(layer.values.get("plugins") or []), layer.source)


def _validated(merged: MergedLayers) -> RunConfig:
    drop_unread(merged.values, merged.sources, merged.order, merged.resolved)
    values = unflatten(merged.values) | {"plugins": tuple(map(asdict, loaded_plugins()))}
    for section in ("model", "train"):  # so that an empty file names the keys that are missing in these
        values.setdefault(section, {})
    return validated(RunConfig, values, merged.sources)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write ``config`` with every key, atomically, so that ``load_config(path) == config`` when defaults change."""
    from megadit import __version__

    text = f"{RESOLVED}, written by megadit {__version__}.\n" + to_yaml(config)
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML text, every key, in the order of the schema."""
    # JSON mode turns tuples into lists and nothing else; floats keep their shortest exact form.
    return dump_yaml(config.model_dump(mode="json"))


class _DataOnly(Section):
    data: DataConfig = DataConfig()


def load_data(path: str | None, overrides: Sequence[str]) -> DataConfig:
    """``data`` of the file at ``path`` (None: the defaults) with ``overrides`` of ``data.*``.

    Image size and classes need not fit a model. Raises UserError as ``load`` does, and for overrides of other sections,
    which would have no effect.
    """
    other = next((text for text in overrides if not text.strip().startswith(("data.", "data="))), None)
    if other is not None:
        raise UserError(f"override: {other!r} changes nothing here; only data.* keys are read")
    layers = read_layers(find_config(path)) if path is not None else []
    require_plugins(layers)
    merged = merge([*layers, override_layer(overrides)], RunConfig)
    drop_unread(merged.values, merged.sources, merged.order, merged.resolved, only="data.")
    values = {key: value for key, value in merged.values.items() if key.split(".")[0] == "data"}
    return validated(_DataOnly, unflatten(values), merged.sources).data


def text_length(path: str | None) -> int | None:
    """``model.text.max_length`` of the configuration at ``path``; None without one, or where the model takes no text.

    Raises UserError as ``load_config`` does.
    """
    if path is None:
        return None
    text = load_config(path).model.text
    return None if text is None else text.max_length
