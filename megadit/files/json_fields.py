"""JSON objects that other programs wrote: each value read as what it must be, or refused by file, key and value.

``Fields`` remembers what was read, so that a reader can say of every other key that it is not carried over.
"""

from __future__ import annotations

import math
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from megadit.errors import UserError
from megadit.files.file_kind import HEAD_BYTES, file_instead, instead, kind_of
from megadit.files.json_text import JsonError, parse_json

_LARGEST = 2**63 - 1
_MOST_BYTES = 2**28  # of a file: far above any configuration or index, and far below a machine's memory
_SHOWN = 60  # characters of a value in a sentence
_AGAIN = "correct the file, or fetch it again"


REQUIRED: Any = object()  # no default: the key must be there
D = TypeVar("D")


class Fields:
    """The keys and values of one JSON object.

    ``where`` names it in messages, with the option or key that it came by: ``IN: 'x/config.json'``. A key whose value
    is null is refused unless the reader says ``null=True``, and then is None; so let the default be None, too.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = values
        self._read: set[str] = set()

    @classmethod
    def of_file(cls, path: Path, option: str, missing: str = _AGAIN) -> Fields:
        """The object in the file at ``path``; ``option`` brought it, ``missing`` helps where it is not there.

        Raises:
            UserError: it cannot be read, is not JSON, or no object.
        """
        where = f"{option}: '{path}'"
        try:
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):  # which might never end, or never begin
                raise UserError(f"{where} is no file: {file_instead(path) or 'give one'}")
            if facts.st_size > _MOST_BYTES:
                other = file_instead(path, "json", "text") or _AGAIN
                raise UserError(f"{where} has {facts.st_size:,} bytes, so that it is no JSON text to read: {other}")
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror or error}); {missing}") from error
        return cls.of_bytes(data, where)

    @classmethod
    def of_bytes(cls, data: bytes | str, where: str) -> Fields:
        """The object that ``data`` holds. Raises UserError as ``of_file`` does."""
        try:
            values = parse_json(data)
        except JsonError as error:
            head = data if isinstance(data, bytes) else data[:HEAD_BYTES].encode("utf-8", "replace")
            other = instead(kind_of(head[:HEAD_BYTES], len(data)), "json", "text")
            raise UserError(f"{where} is not JSON: {other}" if other else f"{where} {error}; {_AGAIN}") from None
        if not isinstance(values, dict):
            raise UserError(f"{where} holds {_kind(values)} and not keys and values; {_AGAIN}")
        return cls(values, where)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def names(self) -> tuple[str, ...]:
        """All keys, in the file's order."""
        return tuple(self._values)

    def values(self) -> Mapping[str, Any]:
        """All keys and values as they stand."""
        return MappingProxyType(dict(self._values))

    def unread(self) -> dict[str, Any]:
        """Keys and values that nobody has asked for; those that begin with an underscore are notes of a program."""
        return {key: value for key, value in self._values.items() if key not in self._read and key[:1] != "_"}

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands, read from here on; ``default`` where the key is not there."""
        self._read.add(key)
        return self._values.get(key, default)

    def integer(
        self, key: str, default: D = REQUIRED, *, least: int = 0, most: int = _LARGEST, null: bool = False
    ) -> int | D:
        """A whole number from ``least`` to ``most``; 32.0 is one. Raises UserError for anything else."""
        value = self._checked(key, default, null, _is_integer, "a whole number")
        if value is not None and not least <= value <= most:
            bounds = f"from {least} to {most}" if most < _LARGEST else f"of {least} or more"
            raise self.refused(key, value, f"a whole number {bounds}")
        return cast("int | D", None if value is None else int(value))

    def number(self, key: str, default: D = REQUIRED, *, above: float = -math.inf, null: bool = False) -> float | D:
        """A finite number larger than ``above``. Raises UserError for anything else."""
        value = self._checked(key, default, null, _is_number, "a finite number")
        if value is not None and not value > above:
            raise self.refused(key, value, f"a number above {above:g}")
        return cast("float | D", None if value is None else float(value))

    def text(self, key: str, default: D = REQUIRED, *, null: bool = False) -> str | D:
        """A text. Raises UserError for anything else."""
        return cast("str | D", self._checked(key, default, null, lambda value: isinstance(value, str), "a text"))

    def flag(self, key: str, default: D = REQUIRED, *, null: bool = False) -> bool | D:
        """True or false. Raises UserError for anything else."""
        value = self._checked(key, default, null, lambda value: isinstance(value, bool), "true or false")
        return cast("bool | D", value)

    def items(self, key: str, default: Sequence[Any] = REQUIRED, *, null: bool = False) -> list[Any]:
        """A list; null, where it is allowed, is an empty one. Raises UserError for anything else."""
        return list(self._checked(key, default, null, lambda value: isinstance(value, list | tuple), "a list") or ())

    def elements(self, key: str, default: Sequence[Any] = REQUIRED, *, null: bool = False) -> Fields:
        """The elements of a list as fields ``KEY[0]``, ``KEY[1]``, ... Raises UserError as ``items``."""
        items = enumerate(self.items(key, default, null=null))
        return Fields({f"{key}[{number}]": value for number, value in items}, self.where)

    def section(self, key: str, default: Mapping[str, Any] = REQUIRED, *, null: bool = False) -> Fields:
        """An object within; null, where it is allowed, is an empty one. Raises UserError for anything else."""
        value = self._checked(key, default, null, lambda value: isinstance(value, Mapping), "keys and values")
        return Fields(value or {}, f"{self.where}, {key}")

    def refused(self, key: str, value: Any, expected: str) -> UserError:
        """The sentence for a value that is not what is ``expected``."""
        return UserError(f"{self.where} has {_printable(key)} {shown(value)}, which must be {expected}; {_AGAIN}")

    def _checked(self, key: str, default: Any, null: bool, accepts: Callable[[Any], bool], expected: str) -> Any:
        """The value, or the default, of the kind that ``accepts`` takes; None for a null that is allowed."""
        if default is REQUIRED and key not in self._values:
            raise UserError(f"{self.where} has no {key}; {_AGAIN}")
        value = self.raw(key, default)
        if value is None and key in self._values and not null:
            raise self.refused(key, value, "given")
        if value is not None and not accepts(value):
            raise self.refused(key, value, expected)
        return value


def shown(value: Any) -> str:
    """A value of a JSON file in a sentence, as the file has it, cut where it is long."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{…}"
    text = _printable(f"'{value[: _SHOWN + 1]}'" if isinstance(value, str) else str(value)[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _printable(text: str) -> str:
    """Line breaks, control characters and lone surrogates as escapes, so that a sentence stays one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and value == value // 1


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "a text" if isinstance(value, str) else shown(value)
