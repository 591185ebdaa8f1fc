"""From what YAML reads to what the schema wants: numbers written by people, lists that are tuples.

YAML 1.1 reads ``1e-4`` as a string, and learning rates of this field are powers of two. So where the schema
wants a number, ``1e-4``, ``2^-10`` and ``2**-10`` are numbers. No expression is ever evaluated.
"""

from __future__ import annotations

import math
import re
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megadit.config.keys import options

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
POWER_OF_TWO = r"2(?:\^|\*\*)([-+]?\d{1,3}(?:\.\d+)?)"
_NUMBER = re.compile(NUMBER)
_POWER_OF_TWO = re.compile(POWER_OF_TWO)


def number(text: str) -> int | float | None:
    """The number that ``text`` writes (``10``, ``1e-4``, ``2^-10``, ``2**9``), or None if it writes none."""
    text = text.strip()
    power = _POWER_OF_TWO.fullmatch(text)
    if power:
        return math.exp2(float(power.group(1)))
    if not _NUMBER.fullmatch(text):
        return None
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def coerce(value: Any, field: FieldInfo) -> Any:
    """``value`` as ``field`` may take it; what cannot be read is returned as it is, for validation to refuse."""
    return _coerce(value, field.annotation)


def _coerce(value: Any, annotation: Any) -> Any:
    for option in options(annotation):
        if get_origin(option) is tuple and isinstance(value, list):
            kinds = tuple(kind for kind in get_args(option) if kind is not Ellipsis)
            # Wrong lengths go on as they are: validation names the length that it wants.
            padded = kinds + (kinds[-1],) * max(0, len(value) - len(kinds))
            return tuple(_coerce(item, kind) for item, kind in zip(value, padded, strict=False))
        if get_origin(option) is list and isinstance(value, list):
            return [_coerce(item, get_args(option)[0]) for item in value]
    wanted = options(annotation)
    if isinstance(value, str) and (int in wanted or float in wanted) and str not in wanted:
        value = _read_number(value)
    # 2^8 and 1e3 are floats; a whole number is welcome where an integer is wanted.
    if isinstance(value, float) and int in wanted and float not in wanted and value.is_integer():
        return int(value)
    return value


def _read_number(text: str) -> Any:
    value = number(text)
    return text if value is None else value
