"""Nested mappings by dotted key, and back: ``{"optim": {"lr": 1}}`` and ``{"optim.lr": 1}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of ``values`` by its dotted key, ``prefix`` before it. An empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def unflatten(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        set_nested(values, key, value)
    return values


def set_nested(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` in place, making sections on the way. A mapping is merged into one that is there."""
    *sections, leaf = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    if isinstance(value, dict) and isinstance(values.get(leaf), dict):
        for name, inner_value in value.items():
            set_nested(values[leaf], str(name), inner_value)
    else:
        values[leaf] = value
