"""JSON files of users: what is wrong in one, in words that say what to take out."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from megadit.files.file_kind import bytes_instead

_COMMENT = ("//", "/*", "#")
_SPACE = re.compile(r"\s*")
_MOST_DIGITS = 1000  # of a whole number; int() itself refuses 4300
_DEEPEST = 100  # lists and objects inside one another; what walks over values later calls itself for each
# A text whole, so that brackets inside it do not count; an open one goes to the end. Nothing is tried twice.
_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


class JsonError(ValueError):
    """The text is not JSON: one phrase, with the line."""


def parse_json(data: bytes | str, *, finite: bool = False) -> Any:
    """The value of a JSON file's bytes (UTF-8, UTF-16 or UTF-32, with or without a byte order mark), or of its text.

    ``finite`` refuses ``NaN``, ``Infinity`` and numbers such as 1e400, which Python would read as infinite.

    Raises:
        JsonError: it is none, naming comments, trailing commas, single quotes and keys that are there twice, or is
            nested more than 100 levels deep; or the bytes are those of another file, such as a web page.
    """
    try:
        return _parsed(data, finite)
    except JsonError:
        other = None if isinstance(data, str) else bytes_instead(data, "json", "text")
        if other is None:
            raise
    raise JsonError(f"is no JSON: {other}")


def null_nonfinite(value: Any) -> Any:
    """Plain data with null for NaN and infinities, which JSON does not know; tuples become lists."""
    if isinstance(value, dict):
        return {key: null_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [null_nonfinite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(data: bytes | str, finite: bool) -> Any:
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        raise JsonError("is not a text file") from None
    if data and not text.removeprefix("\ufeff"):  # nothing but a mark
        raise JsonError("is not a text file")
    _refuse_deep(text)
    constant, number = (_no_constant, _finite) if finite else (None, None)
    try:
        return json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_no_duplicates,
            parse_int=_integer,
            parse_constant=constant,
            parse_float=number,
        )
    except json.JSONDecodeError as error:
        raise JsonError(_phrase(error)) from None


def _refuse_deep(text: str) -> None:
    if text.count("[") + text.count("{") <= _DEEPEST:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        sign = match[0]
        if sign in "[{":
            depth += 1
            if depth > _DEEPEST:
                line = text.count("\n", 0, match.start()) + 1
                raise JsonError(f"is nested too deeply: more than {_DEEPEST} levels (line {line})")
        elif sign in "]}":
            depth -= 1


def _phrase(error: json.JSONDecodeError) -> str:
    text, position = error.doc, error.pos
    remainder = text[position:]
    where = f"(line {error.lineno})"
    before = text[:position].rstrip()
    # Python 3.13 points at the comma, earlier ones at what follows it.
    closing = remainder[_SPACE.match(remainder, 1).end() :][:1] if remainder[:1] == "," else remainder[:1]  # type: ignore[union-attr]
    if closing in ("}", "]") and (remainder[:1] == "," or before.endswith(",")):
        return f"has a comma before the closing {closing}; take the comma out {where}"
    if remainder.lstrip().startswith(_COMMENT):
        return f"has a comment, which JSON does not know; take it out {where}"
    if remainder[:1] == "'":
        return f'has a text in single quotes; write "…" {where}'
    word = re.match(r"[^\W\d]\w*", remainder)
    if word:
        near = {"True": "true", "False": "false", "None": "null"}.get(word[0])
        return f"has the word {word[0]} without quotes; write {near or json.dumps(word[0])} {where}"
    return f"is not valid JSON: {error.msg} {where}"


def _no_constant(name: str) -> float:
    raise JsonError(f"has {name}, which is no number of JSON; write a finite one")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise JsonError(f"has a number of {len(text)} digits; write one that fits 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"has {text}, which is larger than any number here; write a finite one")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise JsonError(f"has the key {key} twice; keep one")
        values[key] = value
    return values
