"""Messages for pydantic's validation errors: dotted key, value, expected type, source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from megadit.config.schema.section import Section, unknown_key
from megadit.config.schema.values import shown
from megadit.errors import UserError, few_lines

S = TypeVar("S", bound=Section)
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "is not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "is not a number"),
    "finite_number": "is not a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "is not true or false"),
    "string_type": "is not a text; put it in quotes",
    **dict.fromkeys(("tuple_type", "list_type"), "is not a list"),
    "model_type": "is not a section; give key: value pairs",
}


_RELATIONS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def validated(schema: type[S], values: Mapping[str, Any], sources: Mapping[str, str]) -> S:
    """``values`` validated as the section ``schema``. Raises UserError with its ``validation_message``."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(validation_message(error, schema, sources)) from None


def validation_message(error: ValidationError, schema: type[Section], sources: Mapping[str, str]) -> str:
    """All details of ``error``, one sentence per line; ``sources``: source of each dotted key."""
    sentences = (_sentence(detail, schema, sources) for detail in _of_keys(error.errors(include_url=False)))
    return few_lines(list(dict.fromkeys(sentences)))


def _of_keys(details: Iterable[Any]) -> Iterator[Any]:
    """The details, with one for a key that is true, false or a word, of which pydantic names either kind by itself."""
    for detail in details:
        *key, kind = detail["loc"] or ("",)
        if kind == "bool" and detail["type"] in ("bool_type", "bool_parsing"):
            continue
        if isinstance(kind, str) and kind.startswith("literal["):
            words = "true, false, " + detail["ctx"]["expected"].replace(" or ", ", ")
            detail = {**detail, "loc": tuple(key), "ctx": {"expected": words}}
        yield detail


def _sentence(detail: Any, schema: type[Section], sources: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "value_error":
        # Our validators write "key: what is wrong; remedy" with the key relative to their section, or their own key.
        message = str(context["error"])
        name = message.partition(":")[0]
        if detail["loc"][-1:] != (name,):
            key = f"{key}.{name}" if key else name
        return f"{key}:{message.partition(':')[2]}{_where(key, sources)}"
    if kind == "extra_forbidden":
        return unknown_key(key, schema) + _where(key, sources)
    if kind == "missing" and isinstance(detail["loc"][-1], int):
        key = key.rpartition(".")[0]
        return f"{key}: {shown(value)} has too few items{_where(key, sources)}"
    if kind == "missing":
        return f"{key}: is missing; give it a value"
    return f"{key}: {shown(value)} {_problem(kind, context, detail['msg'])}{_where(key, sources)}"


def _problem(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return f"is not one of {context['expected'].replace(' or ', ', ')}"
    if kind in _RELATIONS:
        relation, limit = _RELATIONS[kind]
        return f"is not {relation} {_plain(context[limit])}"
    if kind in ("too_short", "too_long"):
        limit = context.get("min_length", context.get("max_length"))
        return f"has {context['actual_length']} items, not {limit}"
    return f"is not valid ({message})"


def _where(key: str, sources: Mapping[str, str]) -> str:
    """`` (in FILE)`` of the key, or of the nearest section above it that has a source."""
    while key:
        if key in sources:
            return f" (in {sources[key]})"
        key = key.rpartition(".")[0]
    return ""


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
