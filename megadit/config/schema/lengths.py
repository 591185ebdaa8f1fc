"""Type of a schedule's lengths: optimizer steps (``1000``), or a share of the run (``5%``)."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import WithJsonSchema

_SHARE = r"[0-9]+(\.[0-9]+)?%"
_SHARE_SCHEMA = {"type": "string", "pattern": f"^{_SHARE}$"}
Share = Annotated[str, WithJsonSchema(_SHARE_SCHEMA)]
Length = int | Share


def length_schema(least: int, *, null: bool = False) -> dict[str, Any]:
    """JSON schema of a length of at least ``least`` steps."""
    kinds: list[dict[str, Any]] = [{"type": "integer", "minimum": least}, _SHARE_SCHEMA]
    return {"anyOf": kinds + [{"type": "null"}] * null}


def steps_of(length: int | str, total: int) -> int:
    """``length`` in optimizer steps of a run of ``total``; a share is rounded down, so up to 100% always fits."""
    if isinstance(length, int):
        return length
    return int(Fraction(length.removesuffix("%")) * total / 100)


def check_length(key: str, value: Any, least: int = 0) -> None:
    """Check that ``value`` is an integer of at least ``least``, or a share of the run.

    Raises:
        ValueError: ``key: what is wrong; remedy``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"{key}: {shown} is neither steps nor a share of the run; write 100 or 5%")
    if isinstance(value, str):
        _check_share(key, value, least)
    elif isinstance(value, float):
        share = f"{value * 100:g}%" if 0 < value < 1 else "5%"
        raise ValueError(f"{key}: {value!r} is not a whole number of steps; write a share of the run as {share}")
    elif value < least:
        raise ValueError(f"{key}: {value} is not at least {least}; write steps, such as 100, or a share such as 5%")


def _check_share(key: str, text: str, least: int) -> None:
    percent = re.fullmatch(r"\s*([-+]?[0-9.]+)\s*%\s*", text)
    try:
        share = None if percent is None else Fraction(percent[1])
    except ValueError:
        share = None
    if share is None:
        raise ValueError(f"{key}: {text!r} is neither steps nor a share of the run; write 100 or 5%")
    if not 0 <= share <= 100:
        raise ValueError(f"{key}: {text!r} is no share of the run, which lies between 0% and 100%; write 5%")
    if least and not share:
        raise ValueError(f"{key}: {text!r} is no length; write steps, such as 100, or a share such as 5%")
    if not re.fullmatch(_SHARE, text):
        raise ValueError(f"{key}: {text!r} is not written as a share of the run; write {float(share):g}%")
