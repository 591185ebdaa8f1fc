"""From what YAML holds to what the schema wants: numbers written by people, lists that are tuples, texts as written.

Learning rates of this field are powers of two, so that where the schema wants a number, ``1e-4``, ``2^-10`` and
``2**-10`` are numbers, with or without quotes. No expression is ever evaluated.
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
_LARGEST = 2**63 - 1  # of a whole number that torch and numpy take
_TRUTH = {"true": True, "false": False}
# Where a truth value is wanted, these words mean nothing else.
_WORDS = {**_TRUTH, "yes": True, "no": False, "on": True, "off": False}


def parse_number(text: str) -> int | float | None:
    """The number that ``text`` writes (``10``, ``1e-4``, ``2^-10``, ``2**9``), or None if it writes none.

    ``010`` is 10, ``1e400`` infinite, and what is too small for a float (``1e-400``) no number rather than 0.
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
    lost = value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0])
    return None if lost else value


def resolve_scalars(value: Any) -> Any:
    """``value`` where no schema says what is wanted: ``Plain`` as YAML 1.2 reads it, ``2^-10`` too; all else stays."""
    if isinstance(value, Plain):
        truth = _TRUTH.get(_folded(value))
        found = parse_number(value) if truth is None else truth
        return str(value) if found is None else found
    if isinstance(value, list | tuple):
        return type(value)(resolve_scalars(item) for item in value)
    if isinstance(value, Mapping):
        return {str(key): resolve_scalars(item) for key, item in value.items()}
    return value


def plain_text(value: Any) -> str:
    """A resolved value in a sentence or a table, as a file has it: null, true, .5 as 0.5, lists in brackets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def shown(value: Any) -> str:
    """A value as a person would write it in YAML; long ones are cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def coerce(value: Any, field: FieldInfo) -> Any:
    """``value`` as ``field`` may take it; what cannot be read is returned as it is, for validation to refuse."""
    return _coerce(value, field.annotation)


def too_large(value: Any) -> bool:
    """Whether ``value`` is or holds a whole number of more than 63 bits, which no tensor could hold."""
    if isinstance(value, list | tuple):
        return any(map(too_large, value))
    return isinstance(value, int) and abs(value) > _LARGEST


def _coerce(value: Any, annotation: Any) -> Any:
    wanted = options(annotation)
    if isinstance(value, list):
        return _items(value, wanted)
    if isinstance(value, Mapping):
        return _mapping(value, wanted)
    if isinstance(value, Plain):
        return _scalar(value, wanted)
    if isinstance(value, str) and (int in wanted or float in wanted):
        found = parse_number(value)
        value = value if found is None else found
    return _whole(value, wanted)


def _items(value: list[Any], wanted: tuple[Any, ...]) -> Any:
    for option in wanted:
        if get_origin(option) is tuple:
            kinds = tuple(kind for kind in get_args(option) if kind is not Ellipsis)
            # Wrong lengths go on as they are: validation names the length that it wants.
            padded = kinds + (kinds[-1],) * max(0, len(value) - len(kinds))
            return tuple(_coerce(item, kind) for item, kind in zip(value, padded, strict=False))
        if get_origin(option) is list:
            return [_coerce(item, get_args(option)[0]) for item in value]
    return value if Any in wanted else resolve_scalars(value)


def _mapping(value: Mapping[Any, Any], wanted: tuple[Any, ...]) -> Any:
    for option in wanted:
        section = section_of(option)
        if section is not None:
            fields = section.model_fields
            return {
                k: _coerce(v, fields[k].annotation) if k in fields else resolve_scalars(v) for k, v in value.items()
            }
        if get_origin(option) is dict:
            return {key: _coerce(item, get_args(option)[1]) for key, item in value.items()}
    return value if Any in wanted else resolve_scalars(value)


def _scalar(text: Plain, wanted: tuple[Any, ...]) -> Any:
    if Any in wanted:
        return text
    if bool in wanted and _folded(text) in _WORDS:
        return _WORDS[_folded(text)]
    if (int in wanted or float in wanted) or not any(kind is str or get_origin(kind) is Literal for kind in wanted):
        return _whole(resolve_scalars(text), wanted)
    named = [name for kind in wanted if get_origin(kind) is Literal for name in get_args(kind)]
    return str(text) if str in wanted or all(isinstance(name, str) for name in named) else resolve_scalars(text)


def _whole(value: Any, wanted: tuple[Any, ...]) -> Any:
    """2^8 and 1e3 are floats; a whole number is welcome where an integer is wanted."""
    if isinstance(value, float) and int in wanted and float not in wanted and value.is_integer():
        return int(value)
    if isinstance(value, int) and float in wanted and int not in wanted and too_large(value):
        return float(value) if abs(value) < 10**300 else math.inf
    return value


def _folded(text: str) -> str:
    """``true``, ``True`` and ``TRUE`` as one; ``tRUE`` is a text."""
    return text.lower() if text in (text.lower(), text.capitalize(), text.upper()) else text
