"""``model.options`` and ``data.options``: name: value pairs that a plugin's family or data source declares."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

Scalar = bool | int | float | str


def with_defaults(given: Mapping[str, Scalar], declared: Mapping[str, Scalar], owner: str) -> dict[str, Scalar]:
    """The ``declared`` options of ``owner``, such as "family dit", with the ``given`` values over their defaults.

    Raises ValueError for an option that is not declared, or whose type is not that of its default.
    """
    values = dict(declared)
    for name, value in given.items():
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1, cutoff=0.0)
            remedy = f"did you mean {near[0]}?" if near else "it has none, leave it out"
            raise ValueError(f"{name}: {value!r} is no option of {owner}; {remedy}")
        kind = type(declared[name])
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"{name}: {value!r} is not of the type of its default, {declared[name]!r}; change it")
        values[name] = kind(value)
    return values
