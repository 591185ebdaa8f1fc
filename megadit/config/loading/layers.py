"""Laying configuration layers over one another: later wins, key by key, and every value keeps its source."""

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

# Two ways to say one thing: a later layer that uses one drops what an earlier layer said by the other.
ALTERNATIVES = (("model.heads", "model.head_dim"), ("train.steps", "train.epochs"))


class MergedLayers:
    """Flat values (``{"optim.lr": 1e-4}``) and, key by key, the source each came from."""

    def __init__(self, schema: type[Section]) -> None:
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.order: dict[str, int] = {}  # by key, also of sections: the layer that said it, counted from the lowest
        self.resolved: frozenset[str] = frozenset()  # keys last said by a layer that says all of them
        self._layers = 0
        self._preset_init = False  # whether model.init is what the preset said, and no file since

    def add(self, layer: ConfigLayer) -> None:
        """Lay ``layer`` over what is there. Raises UserError for keys that the schema does not have."""
        new, name = _flatten(layer, self.schema)
        if name is not None:
            for key in (*PRESET_KEYS, *(["init"] if self._preset_init else [])):
                self._drop(f"model.{key}")
            given = dict(_leaves({"model": preset_values(name)}, self.schema, self.schema, "", layer.source, []))
            self._preset_init = "model.init" in given
            said, new = new, given | _without_overruled(given, new)
        else:
            said = new
        self._preset_init = self._preset_init and "model.init" not in said
        for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
            if new.get(one) is not None and other not in new:
                self._drop(other)
        before = self.values.get("data.name", "")
        if before not in ("", new.get("data.name", before)):
            self._drop("data.options")  # which mean nothing to another source
            if before in DATA_SOURCES and DATA_SOURCES.get(before).own_classes and "data.classes" not in new:
                self._drop("data.classes")  # its names mean nothing in another set
        family = self.values.get("model.family")
        if family not in (None, new.get("model.family", family)):
            self._drop("model.options")  # which mean nothing to another family
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
        while section:  # a value inside a section that was null, or empty, so far
            if section in self.values:
                del self.values[section], self.sources[section]
            section = section.rpartition(".")[0]
        self.values[key], self.sources[key] = value, source

    def _drop(self, key: str) -> None:
        for name in [name for name in self.values if name == key or name.startswith(key + ".")]:
            del self.values[name], self.sources[name]


def merge(layers: Iterable[ConfigLayer], schema: type[Section]) -> MergedLayers:
    """All ``layers``, the first lowest. Raises UserError for unknown keys and presets, naming the layer."""
    merged = MergedLayers(schema)
    for layer in layers:
        merged.add(layer)
    return merged


def _without_overruled(given: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` beside a preset; where it uses the alternative of a preset's key, the preset's becomes null."""
    extra: dict[str, Any] = {}
    for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
        if new.get(one) is not None and other in given and other not in new:
            extra[other] = None
    return extra | new


def _flatten(layer: ConfigLayer, schema: type[Section]) -> tuple[dict[str, Any], str | None]:
    """The layer's values by dotted key, as the schema may take them, and the preset that it names."""
    problems: list[str] = []
    flat: dict[str, Any] = {}
    name: str | None = None
    for key, value in _leaves(layer.values, schema, schema, "", layer.source, problems):
        if key == "model.preset":
            name = value
        else:
            flat[key] = value
    if problems:
        raise UserError(few_lines(problems))
    return flat, name


def _leaves(
    values: Mapping[Any, Any], schema: type[Section], root: type[Section], prefix: str, source: str, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key == "model.preset":
            yield key, resolve_scalars(value)
            continue
        field = schema.model_fields.get(str(name))
        if field is None:
            problem = _one_word(key, prefix) if key in all_keys(root) else unknown_key(key, root)
            problems.append(f"{problem} (in {source})")
            continue
        section = section_of(field.annotation)
        if section is None:
            taken = coerce(value, field)
            if too_large(taken):
                problems.append(f"{key}: {str(value)[:40]} has more than 63 bits; lower it (in {source})")
            if taken and field.annotation == dict[str, Scalar]:
                yield from ((f"{key}.{name}", each) for name, each in taken.items())
            else:
                yield key, taken
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


def _one_word(key: str, prefix: str) -> str:
    sections = key.removeprefix(prefix).split(".")
    nested = ": {".join(sections) + ": …" + "}" * (len(sections) - 1)
    return f"{key}: only an override is written as one word; write {nested} in a file"
