"""JSON schema of configuration files, for editors, and the reference tables of docs/config.md, from the classes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megadit.config.presets import preset_names
from megadit.config.schema.lengths import Share
from megadit.config.schema.registered import registered_names
from megadit.config.schema.run import RunConfig
from megadit.config.schema.section import Section, section_of
from megadit.config.schema.values import NUMBER, POWER_OF_TWO, plain_text


def file_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration *file*.

    Beside the keys of ``RunConfig`` a file may have ``base`` and ``model.preset``; no key is required in it,
    since bases may give them; and a number may be written ``1e-4`` or ``2^-10``, which YAML reads as text.
    """
    schema = RunConfig.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_for_files(schema)}
    schema["title"] = "megadit run configuration"
    text = {"type": "string"}
    schema["properties"]["base"] = {
        "description": "files to inherit from, relative to this one; later ones win",
        "anyOf": [text, {"type": "array", "items": text}],
    }
    schema["$defs"]["ModelConfig"]["properties"]["preset"] = {
        "description": "a named architecture; keys beside it override it",
        "enum": list(preset_names()),
    }
    return schema


def _for_files(node: Any) -> Any:
    if isinstance(node, list):
        return [_for_files(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") in ("number", "integer"):
        labels = {key: node[key] for key in ("title", "description", "default") if key in node}
        number = {key: value for key, value in node.items() if key not in labels}
        text = {"type": "string", "pattern": f"^({NUMBER}|{POWER_OF_TWO})$"}
        return {**labels, "anyOf": [number, text]}
    # No key is required in a file: bases may give it, or it has a default.
    return {key: _for_files(value) for key, value in node.items() if key != "required"}


def reference() -> str:
    """Markdown tables of every key: type, default, range and meaning, one table per section."""
    return "\n".join(_section_tables(RunConfig, ""))


def _section_tables(schema: type[Section], prefix: str) -> Iterator[str]:
    rows: list[str] = []
    sections: dict[type[Section], list[str]] = {}  # one table for a section class that is used by several keys
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            rows.append(_row(name, field))
        else:
            sections.setdefault(section, []).append(name)
    if rows:
        yield f"### `{prefix.rstrip('.') or 'top level'}`\n"
        yield f"{' '.join((schema.__doc__ or '').replace('``', '`').split())}\n"
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from rows
        yield ""
    for section, names in sections.items():
        label = names[0] if len(names) == 1 else f"{{{', '.join(names)}}}"
        yield from _section_tables(section, f"{prefix}{label}.")


def _row(name: str, field: FieldInfo) -> str:
    names = registered_names(field)
    kind = " / ".join(f"`{name}`" for name in names) if names else _type_name(field.annotation)
    limits = "".join(f" {sign} {limit}" for sign, limit in _limits(field))
    meaning = (field.description or "").replace("|", "\\|")
    default = "required" if field.default is PydanticUndefined else f"`{plain_text(field.default)}`"
    kind, null, _ = kind.partition(" or null")
    return f"| `{name}` | {kind}{limits}{null} | {default} | {meaning} |"


def _limits(field: FieldInfo) -> Iterator[tuple[str, Any]]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    for item in field.metadata:
        for attribute, sign in signs.items():
            if hasattr(item, attribute):
                yield sign, plain_text(getattr(item, attribute))


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(annotation))
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in get_args(annotation))
    if annotation == Share:
        return "share"
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    names = {int: "integer", float: "number", str: "text", bool: "true / false", type(None): "null"}
    if origin is dict:
        return "name: value"
    if origin is tuple:
        kinds = get_args(annotation)
        if get_origin(kinds[0]) is tuple:
            return f"list of [{', '.join(names[kind] for kind in get_args(kinds[0]))}]"
        listed = names.get(kinds[0], "text")  # names of weights, and of plugins
        return f"list of {listed}" if Ellipsis in kinds else f"list of {len(kinds)} numbers"
    return names.get(annotation, str(annotation))
