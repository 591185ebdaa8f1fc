"""Sources of configuration values: YAML files with ``base:`` inheritance, and dotted overrides.

Every file and the command line become one ``ConfigLayer`` each, bases before the files that name them;
``layers.merge`` merges them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.config.schema.values import resolve_scalars
from megadit.errors import UserError
from megadit.files.paths import begins_with
from megadit.files.text import decode_text, has_lone_surrogate
from megadit.files.yaml_text import YamlError, parse_yaml, shortened
from megadit.nested import set_nested

OVERRIDES = "an override"
RESOLVED = "# Resolved run configuration, every key"  # how such a file begins
_LONGEST_KEY = 200  # characters
_WRITTEN = (RESOLVED.encode(), b"# Written by megadit")  # the second: files of tools/transfer.py apply


@dataclass(frozen=True)
class ConfigLayer:
    """The values of one file, or of all overrides together, as nested mappings, and their source for messages.

    ``resolved``: a complete configuration that megadit wrote, whose keys the user did not choose one by one.
    """

    values: Mapping[str, Any]
    source: str
    resolved: bool = False


def configs_dir() -> Path:
    """The ``configs`` folder: beside the package (checkout, editable install), else in the current folder."""
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "configs" / "quickstart").is_dir():
            return root / "configs"
    raise UserError("config: no configs folder beside the package or in the current folder; give --config FILE")


def find_config(path: str | Path, option: str = "--config", suffix: str = ".yaml") -> Path:
    """The file at ``path``, or in the configs folder (``dit/xl-2.yaml`` or ``configs/dit/xl-2.yaml``).

    Raises UserError that names ``option`` and the nearest file of the configs folder that ends in ``suffix``.
    """
    requested = Path(path).expanduser()
    if requested.is_file():
        return requested
    if requested.is_dir():
        raise UserError(f"{option}: {path} is a folder; name a {suffix} file in it")
    folder = configs_dir()
    for root in (folder, folder.parent):  # dit/xl-2.yaml, configs/dit/xl-2.yaml
        if (root / requested).is_file():
            return root / requested
    shipped = [str(file.relative_to(folder.parent)) for file in sorted(folder.rglob(f"*{suffix}"))]
    by_name = {Path(name).name: name for name in reversed(shipped)}
    near = difflib.get_close_matches(requested.name, by_name, n=1)
    hint = f"did you mean {by_name[near[0]]}?" if near else "configs/README.md lists ours"
    raise UserError(f"{option}: no file {path}; {hint}")


def read_layers(path: Path) -> list[ConfigLayer]:
    """The layers of the file at ``path`` and of its bases, outermost base first. Raises UserError."""
    return _read_layers(path, ())


def _read_layers(path: Path, chain: tuple[Path, ...]) -> list[ConfigLayer]:
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(display(file) for file in (*chain[chain.index(resolved) :], resolved))
        raise UserError(f"base: {names} is a circle; take one of the base keys out")
    values = read_yaml(path)
    layers: list[ConfigLayer] = []
    for base in _bases(values.pop("base", None), path):
        layers += _read_layers(base, (*chain, resolved))
    return [*layers, ConfigLayer(values, display(path), is_resolved(path))]


def is_resolved(path: Path) -> bool:
    """Whether megadit wrote the configuration file at ``path``, with every key."""
    return begins_with(path, _WRITTEN)


def _bases(value: Any, path: Path) -> list[Path]:
    value = resolve_scalars(value)
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"base: {value!r} is not a file name or a list of them (in {display(path)})")
    bases = []
    for name in names:
        base = path.parent / Path(name).expanduser()  # relative to the file that names it, not to the current folder
        if not base.is_file():
            raise UserError(f"base: no file {name} beside {display(path)}, which inherits from it")
        bases.append(base)
    return bases


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at ``path``. Raises UserError, also for a key that stands twice."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}") from None
    try:
        values = parse_yaml(decode_text(data, f"config: {display(path)}"))
    except YamlError as error:
        raise UserError(f"config: {display(path)} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "str"
        raise UserError(f"config: {display(path)} holds {kind}, not sections of key: value pairs")
    return values


def override_layer(overrides: Sequence[str]) -> ConfigLayer:
    """``["optim.lr=2^-10", "optim.betas=[0.9, 0.95]"]`` as one layer; values are read as YAML. Raises UserError."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key or key.startswith("-"):
            raise UserError(f"override: {override!r} is not of the form section.key=value, e.g. optim.lr=2^-10")
        if len(key) > _LONGEST_KEY:
            raise UserError(f"override: {shortened(key)!r} is no key of a configuration; write section.key=value")
        if has_lone_surrogate(override):  # Python's stand-ins for bytes that are not UTF-8
            raise UserError(
                f"{shortened(key)}: {shortened(text)!r} is not UTF-8; where it names a file or folder, rename that or "
                "give a link to it"
            )
        if not text.strip():
            raise UserError(f"{key}: the override gives no value; write one, or {key}=null for none")
        if key == "base":
            raise UserError(f"base: {text} cannot be an override, only a file inherits; name it by --config")
        if key.partition(".")[0] == "plugins":
            raise UserError(f"plugins: {shortened(text)} cannot be an override; give it as --plugins MODULE")
        try:
            value = parse_yaml(text, comments=False)
        except YamlError as error:
            raise UserError(f"{key}: {shortened(text)!r} is not a YAML value: {error}") from None
        set_nested(values, key, value)
    return ConfigLayer(values, OVERRIDES)


def display(path: Path) -> str:
    """A path as a person would type it: relative when it lies under the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
