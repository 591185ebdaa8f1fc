"""Values of a study file as the configuration keys that they are for take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadit.config.schema.run import RunConfig
from megadit.config.schema.section import walk
from megadit.config.schema.values import coerce, meaning, number


def plain(value: Any) -> Any:
    """A value whose key is not known, lists as tuples."""
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else meaning(value)


def plain_numbers(value: Any) -> Any:
    """Bounds: ``2^-10`` and ``1e-4`` are numbers with quotes too, lists tuples."""
    if isinstance(value, list | tuple):
        return tuple(plain_numbers(item) for item in value)
    found = number(value) if isinstance(value, str) else None
    return meaning(value) if found is None else found


def as_keys_take(changes: Any) -> Any:
    """Dotted configuration keys with their values as these take them, lists as lists."""
    if not isinstance(changes, Mapping):
        return changes
    return {key: _taken(key, value) for key, value in changes.items()}


def listed_as_keys_take(space: Any) -> Any:
    """The dimensions of a space with each listed value as the key of the dimension takes it."""
    if not isinstance(space, Mapping):
        return space
    return {key: _dimension(key, given) if isinstance(given, Mapping) else given for key, given in space.items()}


def _dimension(key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        kind: [_taken(key, value) for value in values]
        if kind in ("grid", "choice") and isinstance(values, list | tuple)
        else values
        for kind, values in given.items()
    }


def _taken(key: str, value: Any) -> Any:
    field = dict(walk(RunConfig)).get(key)
    taken = meaning(value) if field is None else coerce(value, field)
    return list(taken) if isinstance(taken, tuple) else taken
