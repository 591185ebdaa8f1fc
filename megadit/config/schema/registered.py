"""Types of the schema for names of a registry (``model.family``, ``data.name``), and for the list of plugins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from megadit.config.schema.section import Section
from megadit.registry import Registry


@dataclass(frozen=True)
class Registered:
    """``Annotated[str, Registered(REGISTRY)]``: the names of REGISTRY, as a ``Literal`` of them.

    They are looked up when a value is validated, so that those of plugins are among them.
    """

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.registry.names())}

    def _check(self, value: Any) -> str:
        names = self.registry.names()
        if not isinstance(value, str) or value not in names:
            *most, last = map(repr, names)
            expected = f"{', '.join(most)} or {last}; a plugin's needs --plugins MODULE"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return str(value)


def registered_names(field: FieldInfo) -> tuple[str, ...]:
    """The names of ``field``'s registry; none where it has none."""
    return next((item.registry.names() for item in field.metadata if isinstance(item, Registered)), ())


class PluginRecord(Section):
    """A plugin that was imported: its version, if it has one, and the SHA-256 of its Python files."""

    name: str
    version: str = ""
    sha256: str = ""


def _as_records(values: Any) -> Any:
    """Names as records without version and hash."""
    if not isinstance(values, list | tuple):
        return values
    return tuple({"name": value} if isinstance(value, str) else value for value in values)


# A list of plugins: names in a user's file, records in one that megadit wrote.
Plugins = Annotated[
    tuple[PluginRecord, ...],
    BeforeValidator(_as_records),
    WithJsonSchema(
        {"type": "array", "items": {"anyOf": [{"type": "string"}, PluginRecord.model_json_schema()]}, "default": []}
    ),
]
