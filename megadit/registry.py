"""Registries of extensions by name, megadit's and those of plugins. Each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Any, Generic, TypeVar

from megadit.errors import UserError, did_you_mean

T = TypeVar("T")


def load_object(path: str) -> Any:
    """The object at ``package.module:attribute``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Generic[T]):
    """Extensions of one kind.

    kind: what messages call one, such as "model family".
    key: the key or option by which users choose one, such as ``model.family``.
    builtin: ``package:NAME`` of a mapping from names to ``module:attribute``, in a package that imports nothing heavy.
    """

    def __init__(self, kind: str, key: str, builtin: str) -> None:
        self.kind, self.key = kind, key
        self._builtin = builtin
        self._added: dict[str, T | str] = {}

    def add(self, name: str, value: T | str) -> None:
        """Add a plugin's extension, or its ``module:attribute``, to be imported when it is used.

        Raises:
            UserError: the name is taken.
        """
        if name in self:
            raise UserError(f"{self.kind} {name!r}: there is one of that name already; choose another name")
        self._added[name] = value

    def discard(self, name: str) -> None:
        """Undo ``add``."""
        self._added.pop(name, None)

    def added(self) -> tuple[str, ...]:
        """The names that plugins added."""
        return tuple(self._added)

    def names(self) -> tuple[str, ...]:
        """All names, those of megadit first."""
        return (*load_object(self._builtin), *self._added)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The extension called ``name``.

        Raises:
            UserError: there is none; the message suggests the nearest name.
        """
        values = {**load_object(self._builtin), **self._added}
        if name not in values:
            hint = did_you_mean(str(name), self.names())
            raise UserError(f"{self.key}: {name!r} is no {self.kind}; {hint} A plugin's needs --plugins MODULE")
        entry = values[name]
        value: T = load_object(entry) if isinstance(entry, str) else entry
        return value
