"""Merges configuration layers key by key, the last wins, and records the source of every value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megadit.config.loading.sources import ConfigLayer
from megadit.config.options import Scalar
from megadit.config.presets import PRESET_KEYS, preset_values
from megadit.config.schema.section import Section, all_keys, options, section_of, unknown_key
from megadit.config.schema.values import coerce, resolve_scalars, too_large
from megadit.errors import UserError, few_lines
from megadit.extensions import DATA_SOURCES

# Pairs of keys that exclude each other: a later layer that sets one drops the other of earlier layers.
ALTERNATIVES = (("model.heads", "model.head_dim"), ("train.steps", "train.epochs"))


class MergedLayers:
    """The merged values by dotted key (``{"optim.lr": 1e-4}``), and the source of each."""

    def __init__(self, schema: type[Section]) -> None:
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.order: dict[str, int] = {}  # index of the layer that set each key or section, from the lowest
        self.resolved: frozenset[str] = frozenset()  # keys last set by a layer with every key
        self._layers = 0
        self._preset_init = False  # whether model.init is that of the preset

    def add(self, layer: ConfigLayer) -> None:
        """Merge ``layer`` over the values so far. Raises UserError for keys that the schema does not have."""
        new, preset = _typed_values(layer, self.schema)
        if preset is not None:
            for key in (*PRESET_KEYS, *(["init"] if self._preset_init else [])):
                self._drop(f"model.{key}")
            of_preset = dict(_leaves({"model": preset_values(preset)}, self.schema, self.schema, "", layer.source, []))
            self._preset_init = "model.init" in of_preset
            of_layer, new = new, of_preset | _with_alternatives_unset(of_preset, new)
        else:
            of_layer = new
        self._preset_init = self._preset_init and "model.init" not in of_layer
        for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
            if new.get(one) is not None and other not in new:
                self._drop(other)
        before = self.values.get("data.name", "")
        if before not in ("", new.get("data.name", before)):
            self._drop("data.options")  # they are the former source's
            if before in DATA_SOURCES and DATA_SOURCES.get(before).own_classes and "data.classes" not in new:
                self._drop("data.classes")  # they are names of the former source
        family = self.values.get("model.family")
        if family not in (None, new.get("model.family", family)):
            self._drop("model.options")  # they are the former family's
        for key, value in new.items():
            self._set(key, value, layer.source)
        self.order |= dict.fromkeys(new, self._layers)
        self.resolved = (self.resolved - new.keys()) | (frozenset(new) if layer.resolved else frozenset())
        self._layers += 1

    def _set(self, key: str, value: Any, source: str) -> None:
        if value == {} and any(name.startswith(key + ".") for name in self.values):
            return
        self._drop(key)
        section = key.rpartition(".")[0]
        while section:  # a section that was null, or empty, now has a value
            if section in self.values:
                del self.values[section], self.sources[section]
            section = section.rpartition(".")[0]
        self.values[key], self.sources[key] = value, source

    def _drop(self, key: str) -> None:
        for name in [name for name in self.values if name == key or name.startswith(key + ".")]:
            del self.values[name], self.sources[name]


def merge(layers: Iterable[ConfigLayer], schema: type[Section]) -> MergedLayers:
    """Merge ``layers``, the first is the lowest. Raises UserError for unknown keys and presets, naming the layer."""
    merged = MergedLayers(schema)
    for layer in layers:
        merged.add(layer)
    return merged


def _with_alternatives_unset(of_preset: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, with null for a key of the preset whose alternative ``new`` sets."""
    unset: dict[str, Any] = {}
    for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
        if new.get(one) is not None and other in of_preset and other not in new:
            unset[other] = None
    return unset | new


def _typed_values(layer: ConfigLayer, schema: type[Section]) -> tuple[dict[str, Any], str | None]:
    """The layer's values by dotted key, coerced to the types of the schema, and the preset that it names."""
    problems: list[str] = []
    values = dict(_leaves(layer.values, schema, schema, "", layer.source, problems))
    if problems:
        raise UserError(few_lines(problems))
    preset = values.pop("model.preset", None)
    return values, preset


def _leaves(
    values: Mapping[Any, Any], schema: type[Section], root: type[Section], prefix: str, source: str, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """Not ``megadit.nested.flatten``: the schema says which mappings are sections and which are values."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key == "model.preset":
            yield key, resolve_scalars(value)
            continue
        field = schema.model_fields.get(str(name))
        if field is None:
            problem = _dotted_in_file(key, prefix) if key in all_keys(root) else unknown_key(key, root)
            problems.append(f"{problem} (in {source})")
            continue
        section = section_of(field.annotation)
        if section is None:
            coerced = coerce(value, field)
            if too_large(coerced):
                problems.append(f"{key}: {str(value)[:40]} has more than 63 bits; lower it (in {source})")
            if coerced and field.annotation == dict[str, Scalar]:
                yield from ((f"{key}.{name}", option) for name, option in coerced.items())
            else:
                yield key, coerced
        elif isinstance(value, Mapping) and value:
            yield from _leaves(value, section, root, f"{key}.", source, problems)
        elif value is None and type(None) in options(field.annotation):
            yield key, None
        elif value is None or value == {}:
            yield key, {}
        else:
            problems.append(
                f"{key}: {resolve_scalars(value)!r} is not a section; give {key}.KEY: value pairs (in {source})"
            )


def _dotted_in_file(key: str, prefix: str) -> str:
    sections = key.removeprefix(prefix).split(".")
    as_sections = ": {".join(sections) + ": …" + "}" * (len(sections) - 1)
    return f"{key}: only an override is written as one word; write {as_sections} in a file"
