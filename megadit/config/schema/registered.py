"""A value that is a name in a registry, to which plugins add: ``model.family``, ``data.name``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from megadit.registry import Registry


@dataclass(frozen=True)
class Registered:
    """``Annotated[str, Registered(REGISTRY)]`` takes the names of REGISTRY, as ``Literal`` takes those it lists.

    Names are looked up when a value is checked, so that those of plugins are among them.
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
            wanted = f"{', '.join(most)} or {last}; a plugin's needs --plugins MODULE"
            raise PydanticKnownError("literal_error", {"expected": wanted})
        return str(value)


def registered_names(field: FieldInfo) -> tuple[str, ...]:
    """The names that ``field`` takes; none where it takes others than those of a registry."""
    return next((item.registry.names() for item in field.metadata if isinstance(item, Registered)), ())
