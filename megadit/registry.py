"""Extensions by name: those that megadit has, and those that a plugin adds. Each is imported when it is asked for."""

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
        """Add what a plugin brings, or where it is, ``module:attribute``, for what is to be imported when it is used.

        Raises:
            UserError: the name is taken.
        """
        if name in self:
            raise UserError(f"{self.kind} {name!r}: there is one of that name already; choose another name")
        self._added[name] = value

    def discard(self, name: str) -> None:
        """Take back what ``add`` added."""
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
            UserError: there is none; the message names the nearest and the remedy.
        """
        values = {**load_object(self._builtin), **self._added}
        if name not in values:
            hint = did_you_mean(str(name), self.names())
            raise UserError(f"{self.key}: {name!r} is no {self.kind}; {hint} A plugin's needs --plugins MODULE")
        found = values[name]
        value: T = load_object(found) if isinstance(found, str) else found
        return value
