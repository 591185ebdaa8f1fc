"""``Section``, the base class of the schema, its dotted keys, and suggestions for unknown keys."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

# Keys of a file that are not in the schema.
FILE_KEYS = ("base", "model.preset")


class Section(BaseModel):
    """One section of a run configuration (pydantic v2).

    Unknown keys, silent coercion ("3" to 3, true to 1), nan and infinity are errors, and instances are frozen: the run
    uses the values that were validated. Change one with ``megadit.config.replace``, which validates again.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def section_of(annotation: Any) -> type[Section] | None:
    """The section class in a field's annotation (``VaeConfig | None`` → ``VaeConfig``), or None."""
    for option in options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without ``Annotated``; of another annotation, itself."""
    if get_origin(annotation) is Annotated:
        return options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for option in get_args(annotation) for inner in options(option))
    return (annotation,)


def walk(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of ``schema`` with its field, sections before their keys: ``optim``, ``optim.lr``, …"""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        section = section_of(field.annotation)
        if section is not None:
            yield from walk(section, f"{prefix}{name}.")


@cache
def all_keys(schema: type[Section]) -> tuple[str, ...]:
    """Every dotted key of ``schema``, sections included."""
    return tuple(key for key, _ in walk(schema))


def unknown_key(key: str, schema: type[Section]) -> str:
    """The sentence for a key that ``schema`` does not have, with the nearest key.

    That is a similar key of the same section, the same last word elsewhere (``lr`` → ``optim.lr``), or a similar dotted
    key anywhere; else the keys of the section are listed.
    """
    known = (*FILE_KEYS, *all_keys(schema))
    parent, _, leaf = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    namesakes = sorted((name for name in known if name.rpartition(".")[2] == leaf), key=lambda name: name.count("."))
    leaves = {name.rpartition(".")[2]: name for name in siblings}
    near_leaf = difflib.get_close_matches(_plainly(leaf), leaves, n=1, cutoff=0.6)
    near_key = difflib.get_close_matches(_plainly(key), [name for name in known if name != parent], n=1, cutoff=0.7)
    if near_leaf:
        remedy = f"did you mean {leaves[near_leaf[0]]}?"
    elif namesakes:
        remedy = f"did you mean {' or '.join(namesakes[:3])}?"
    elif near_key:
        remedy = f"did you mean {near_key[0]}?"
    elif siblings:
        remedy = f"{parent or 'a configuration'} has {', '.join(leaves)}"
    else:
        remedy = f"a configuration has {', '.join(name for name in known if '.' not in name)}"
    return f"{key if key.isprintable() else repr(key)}: no such key; {remedy}"


def _plainly(key: str) -> str:
    """``key`` for a comparison, in lower case and without spaces."""
    return "".join(key.lower().split())
