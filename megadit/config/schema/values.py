"""Coerces YAML values to the types of the schema: numbers, lists as tuples, texts.

Many learning rates are powers of two, so that where the schema has a number, ``1e-4``, ``2^-10`` and ``2**-10`` are
numbers, with or without quotes. No expression is ever evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from megadit.config.schema.section import options, section_of
from megadit.files.yaml_text import Plain

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
POWER_OF_TWO = r"2(?:\^|\*\*)([-+]?\d{1,3}(?:\.\d+)?)"
_NUMBER = re.compile(NUMBER, re.ASCII)
_POWER_OF_TWO = re.compile(POWER_OF_TWO, re.ASCII)
_DECIMAL = re.compile(r"[-+]?\d+", re.ASCII)
_BASED = re.compile(r"[-+]?(0x[0-9a-fA-F]+|0o[0-7]+)")  # YAML 1.2's other whole numbers; 010 is ten
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LARGEST = 2**63 - 1  # the largest integer of torch and numpy
_TRUTH = {"true": True, "false": False}
# More words for booleans, where the schema has one.
_WORDS = {**_TRUTH, "yes": True, "no": False, "on": True, "off": False}


def parse_number(text: str) -> int | float | None:
    """The number that ``text`` denotes (``10``, ``1e-4``, ``2^-10``, ``2**9``), or None if it is no number.

    ``010`` is 10, ``1e400`` infinite, and a number too small for a float (``1e-400``) None rather than 0.
    """
    text = text.strip(" ")
    power = _POWER_OF_TWO.fullmatch(text)
    if power:
        return math.exp2(float(power.group(1)))
    if _DECIMAL.fullmatch(text):
        return int(text) if len(text) < 4000 else math.inf
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    underflows = value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0])
    return None if underflows else value


def resolve_scalars(value: Any) -> Any:
    """``value`` without a schema: each ``Plain`` scalar in it as YAML 1.2 reads it, and ``2^-10`` as a number."""
    if isinstance(value, Plain):
        truth = _TRUTH.get(_folded(value))
        resolved = parse_number(value) if truth is None else truth
        return str(value) if resolved is None else resolved
    if isinstance(value, list | tuple):
        return type(value)(resolve_scalars(item) for item in value)
    if isinstance(value, Mapping):
        return {str(key): resolve_scalars(item) for key, item in value.items()}
    return value


def plain_text(value: Any) -> str:
    """A value in a sentence or a table, as in a file: null, true, 0.5, lists in brackets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def shown(value: Any) -> str:
    """A value in an error message, as in YAML; texts in quotes, at most 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def coerce(value: Any, field: FieldInfo) -> Any:
    """``value`` coerced to the type of ``field``; what cannot be is returned unchanged, for validation to refuse."""
    return _coerce(value, field.annotation)


def too_large(value: Any) -> bool:
    """Whether ``value`` is or contains an integer of more than 63 bits, which no tensor can hold."""
    if isinstance(value, list | tuple):
        return any(map(too_large, value))
    return isinstance(value, int) and abs(value) > _LARGEST


def _coerce(value: Any, annotation: Any) -> Any:
    types = options(annotation)
    if isinstance(value, list):
        return _items(value, types)
    if isinstance(value, Mapping):
        return _mapping(value, types)
    if isinstance(value, Plain):
        return _scalar(value, types)
    if isinstance(value, str) and (int in types or float in types):
        number = parse_number(value)
        value = value if number is None else number
    return _integral(value, types)


def _items(value: list[Any], types: tuple[Any, ...]) -> Any:
    for option in types:
        if get_origin(option) is tuple:
            kinds = tuple(kind for kind in get_args(option) if kind is not Ellipsis)
            # A wrong length is kept: validation refuses it and names the right one.
            padded = kinds + (kinds[-1],) * max(0, len(value) - len(kinds))
            return tuple(_coerce(item, kind) for item, kind in zip(value, padded, strict=False))
        if get_origin(option) is list:
            return [_coerce(item, get_args(option)[0]) for item in value]
    return value if Any in types else resolve_scalars(value)


def _mapping(value: Mapping[Any, Any], types: tuple[Any, ...]) -> Any:
    for option in types:
        section = section_of(option)
        if section is not None:
            fields = section.model_fields
            return {
                k: _coerce(v, fields[k].annotation) if k in fields else resolve_scalars(v) for k, v in value.items()
            }
        if get_origin(option) is dict:
            return {key: _coerce(item, get_args(option)[1]) for key, item in value.items()}
    return value if Any in types else resolve_scalars(value)


def _scalar(text: Plain, types: tuple[Any, ...]) -> Any:
    if Any in types:
        return text
    if bool in types and _folded(text) in _WORDS:
        return _WORDS[_folded(text)]
    if (int in types or float in types) or not any(kind is str or get_origin(kind) is Literal for kind in types):
        return _integral(resolve_scalars(text), types)
    named = [name for kind in types if get_origin(kind) is Literal for name in get_args(kind)]
    return str(text) if str in types or all(isinstance(name, str) for name in named) else resolve_scalars(text)


def _integral(value: Any, types: tuple[Any, ...]) -> Any:
    """2^8 and 1e3 are floats: as an integer where the schema has one."""
    if isinstance(value, float) and int in types and float not in types and value.is_integer():
        return int(value)
    if isinstance(value, int) and float in types and int not in types and too_large(value):
        return float(value) if abs(value) < 10**300 else math.inf
    return value


def _folded(text: str) -> str:
    """``true``, ``True`` and ``TRUE`` as ``true``; ``tRUE`` unchanged."""
    return text.lower() if text in (text.lower(), text.capitalize(), text.upper()) else text
