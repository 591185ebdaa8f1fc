"""``Section``, of which the schema is made, its dotted keys, and the nearest valid key for one that is wrong."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

# What a file may have beside the keys of the schema.
FILE_KEYS = ("base", "model.preset")


class Section(BaseModel):
    """One section of a run configuration (pydantic v2).

    No unknown keys, no silent coercion ("3" is not 3, true is not 1, nan is not a number) and no
    assignment after construction: what was checked is what the run uses. Change a value with
    ``megadit.config.replace``, which checks again.
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
    """The section class behind a field's annotation (``VaeConfig | None`` → ``VaeConfig``), or None for a value."""
    for option in options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without what ``Annotated`` adds to them; of anything else, the one it is."""
    if get_origin(annotation) is Annotated:
        return options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for option in get_args(annotation) for inner in options(option))
    return (annotation,)


def walk(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of ``schema`` with its field, sections before what they hold: ``optim``, ``optim.lr``, …"""
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
    """Say that ``key`` is not one of ``schema`` and which one was probably meant.

    In order: the same last word elsewhere (``lr`` → ``optim.lr``), a similar key beside it, a similar
    dotted key anywhere; failing these, what the section holds.
    """
    known = (*FILE_KEYS, *all_keys(schema))
    parent, _, leaf = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    namesakes = sorted((name for name in known if name.rpartition(".")[2] == leaf), key=lambda name: name.count("."))
    leaves = {name.rpartition(".")[2]: name for name in beside}
    near_leaf = difflib.get_close_matches(_plainly(leaf), leaves, n=1, cutoff=0.6)
    near_key = difflib.get_close_matches(_plainly(key), [name for name in known if name != parent], n=1, cutoff=0.7)
    if near_leaf:
        remedy = f"did you mean {leaves[near_leaf[0]]}?"
    elif namesakes:
        remedy = f"did you mean {' or '.join(namesakes[:3])}?"
    elif near_key:
        remedy = f"did you mean {near_key[0]}?"
    elif beside:
        remedy = f"{parent or 'a configuration'} has {', '.join(leaves)}"
    else:
        remedy = f"a configuration has {', '.join(name for name in known if '.' not in name)}"
    return f"{key if key.isprintable() else repr(key)}: no such key; {remedy}"


def _plainly(key: str) -> str:
    """``key`` for a comparison: no capitals, and no spaces that look like none."""
    return "".join(key.lower().split())
