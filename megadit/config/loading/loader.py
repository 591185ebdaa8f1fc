"""Loading, changing and saving run configurations: ``load_config``, ``load``, ``replace``, ``save_config``."""

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

QUICKSTART = "quickstart/emoji.yaml"  # what runs when no --config is given


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and what is known of its origin.

    ``user_set`` maps each dotted key that the user set, in a file they named or by an override, to where
    (``configs/dit/xl-2.yaml``, ``an override``). The quickstart that runs without ``--config`` sets nothing in
    this sense: its values are defaults, which a ds_config may overrule. ``resolved``: those of them that a file says
    which megadit wrote with every key, so that nobody asked for each.
    """

    config: RunConfig
    user_set: Mapping[str, str] = field(default_factory=dict)
    source: str = "defaults"
    resolved: frozenset[str] = frozenset()


def load(path: str | Path | None = None, overrides: Sequence[str] = (), *, may_import: bool = False) -> LoadedConfig:
    """Read the file at ``path`` (None: the quickstart) with its bases, lay ``overrides`` over it and check all.

    ``may_import``: the plugins that the file names are imported, unless megadit wrote it. Raises UserError that names
    every wrong key with its value, its source and what to write instead.
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
    """``load(path, overrides).config``: the checked configuration alone. Raises UserError."""
    return load(path, overrides).config


def load_layers(layers: Sequence[ConfigLayer]) -> RunConfig:
    """The checked configuration that ``layers`` make, the first lowest. Raises UserError."""
    require_plugins(layers)
    return _validated(merge(layers, RunConfig))


def replace(
    config: RunConfig, changes: Mapping[str, Any], source: str = "a change", *, resolved: bool = False
) -> RunConfig:
    """``config`` with dotted ``changes`` (``{"model.width": 256, "optim.lr": 2e-4}``), checked again.

    ``source`` is what error messages call the origin of the changes; ``resolved``: they come from another whole
    configuration, so that a key among them that nothing reads is no mistake. Raises UserError.
    """
    whole = ConfigLayer(config.model_dump(), "the configuration", resolved=True)
    return _validated(merge([whole, ConfigLayer(unflatten(changes), source, resolved)], RunConfig))


def require_plugins(layers: Sequence[ConfigLayer]) -> None:
    """Refuse, before their values mean anything, layers that name plugins which nobody imported. Raises UserError."""
    for layer in layers:
        require_imported(plugin_records(layer.values.get("plugins") or []), layer.source)


def _validated(merged: MergedLayers) -> RunConfig:
    drop_unread(merged.values, merged.sources, merged.order, merged.resolved)
    values = unflatten(merged.values) | {"plugins": tuple(map(asdict, loaded_plugins()))}
    for section in ("model", "train"):  # so that an empty file names the keys that are missing in these
        values.setdefault(section, {})
    return validated(RunConfig, values, merged.sources)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write ``config`` with every key, so that ``load_config(path) == config`` whatever later defaults become.

    The file appears whole or not at all.
    """
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
    """``data`` of the file at ``path`` (None: the defaults) with ``overrides`` of ``data.*`` laid over it.

    No model has to fit: image sizes and classes are free. Raises UserError as ``load`` does, and for overrides of other
    sections, which would change nothing.
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
