"""Plugins: Python modules of users that add to megadit's registries. See megadit/extensions.py, docs/extending.md.

A module is imported only if the command line (``--plugins``) or the ``--config`` of a training or sweep names it. The
plugins that an artefact (run directory, checkpoint, study, exported weights) or a configuration's base records are
compared with those imported, and never imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megadit.errors import UserError
from megadit.extensions import PLUGINS

_SHORT = 12  # hexadecimal digits of a digest in a sentence


@dataclass(frozen=True)
class Plugin:
    """An imported plugin, as artefacts record it.

    version: its ``__version__``, else that of the distribution of its name, else empty.
    sha256: of its Python files, wherever they lie.
    """

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return describe_plugin(self.name, self.version, self.sha256)


def loaded_plugins() -> tuple[Plugin, ...]:
    """The plugins of this process, in the order of their import."""
    return tuple(PLUGINS.values())


def plugin_names(options: Iterable[str]) -> list[str]:
    """The modules that ``--plugins a,b --plugins c`` names.

    Raises:
        UserError: an option names none.
    """
    names: list[str] = []
    for option in options:
        named = [name.strip() for name in option.split(",") if name.strip()]
        if not named:
            raise UserError(f"--plugins: {option!r} names no module; give one or more, or leave the option out")
        names += named
    return names


def load_plugins(names: Iterable[str], source: str = "--plugins") -> None:
    """Import the modules and call their ``register()``; those already imported are skipped.

    They are searched for on ``sys.path``, then in the current folder. ``source`` names their origin in messages.

    Raises:
        UserError: a name is no module name, or a module is missing, fails, has no ``register()``, or registers a name
            that is taken.
    """
    for name in names:
        if name not in PLUGINS:
            PLUGINS[name] = _load(name, source)


def _load(name: str, source: str) -> Plugin:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        remedy = f"write {Path(name).stem}" if name.endswith(".py") else "write it as import does, such as my_plugin"
        raise UserError(f"{source}: {name!r} is not the name of a Python module; {remedy}")
    _search_current_folder_last()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{source}: {name} cannot be imported ({_error_with_line(error)})") from error
        raise UserError(
            f"{source}: there is no module {name} on PYTHONPATH or in the current folder; correct the name, or add its "
            "folder to PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{source}: {name} cannot be imported ({_error_with_line(error)})") from error
    register = getattr(module, "register", None)
    if not callable(register):
        file = getattr(module, "__file__", None) or "no file of Python's"
        raise UserError(f"{source}: {name} ({file}) is no plugin: it has no register(); docs/extending.md has examples")
    try:
        register()
    except UserError as error:
        raise UserError(f"{source}: {name} cannot be registered: {error}") from error
    except Exception as error:
        raise UserError(f"{source}: {name} cannot be registered ({_error_with_line(error)})") from error
    return Plugin(name, _version(module), _digest(module))


def _search_current_folder_last() -> None:
    """Put the current folder at the end of ``sys.path``, whatever started this process.

    ``python -m`` puts the folder first, where a file of it would shadow an installed package; a script leaves it out.
    """
    folder = os.getcwd()
    python_path = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if folder in python_path:
        return
    sys.path[:] = [*(part for part in sys.path if part not in ("", folder)), folder]


def _error_with_line(error: BaseException) -> str:
    """An exception with the line that raised it, on one line."""
    frames = list(traceback.extract_tb(error.__traceback__))
    import_machinery = (__file__, "<frozen", os.path.dirname(importlib.__file__))
    frames = [frame for frame in frames if not frame.filename.startswith(import_machinery)]
    location = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return location + " ".join(f"{type(error).__name__}: {error}".split())


def _version(module: ModuleType) -> str:
    version = getattr(module, "__version__", None)
    if version is not None:
        return str(version)
    try:
        return importlib.metadata.version(module.__name__.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(module: ModuleType) -> str:
    """SHA-256 over the Python files of a package, or of the module: their names below it and their contents."""
    spec = module.__spec__
    package = module if hasattr(module, "__path__") else sys.modules.get(spec.parent or "") if spec else None
    if getattr(package, "__file__", None) is None:  # a folder without __init__.py, which other distributions may share
        package = None
    file = Path(str((package or module).__file__))
    files = sorted(file.parent.rglob("*.py")) if package is not None else [file]
    digest = hashlib.sha256()
    try:
        for path in files:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(file.parent).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError as error:
        raise UserError(f"--plugins: '{path}' cannot be read ({error.strerror}); a plugin needs its source") from error
    return digest.hexdigest()


def describe_plugin(name: str, version: str, sha256: str) -> str:
    """A plugin as messages write it: ``toy 1.2 (sha256 0123456789ab)``."""
    text = f"{name} {version}".rstrip()
    return f"{text} (sha256 {sha256[:_SHORT]})" if sha256 else text


def plugin_records(values: Any) -> list[dict[str, str]]:
    """The entries of a file's ``plugins``, names or records, as records of name, version and sha256.

    Raises:
        UserError: it is not a list of these.
    """
    if not isinstance(values, list | tuple):
        raise UserError(f"plugins: {str(values)[:60]!r} is not a list of modules; write plugins: [my_plugin]")
    records = []
    for value in values:
        record = value if isinstance(value, Mapping) else {"name": value}
        if (
            not isinstance(record.get("name"), str)
            or not record["name"]
            or record.keys() - {"name", "version", "sha256"}
        ):
            raise UserError(f"plugins: {str(value)[:60]!r} is not the name of a module; write plugins: [my_plugin]")
        records.append({key: str(record.get(key) or "") for key in ("name", "version", "sha256")})
    return records


def require_imported(records: Sequence[Mapping[str, str]], source: str) -> None:
    """Check that the recorded plugins of an artefact were imported; none is imported here.

    Raises:
        UserError: one was not; names module, version and option.
    """
    missing = [record for record in records if record["name"] not in PLUGINS]
    if missing:
        names = " and ".join(describe_plugin(record["name"], record["version"], "") for record in missing)
        raise UserError(
            f"plugins: {source} names {names}, and reading it imports nothing; if you trust the module, give --plugins "
            f"{','.join([*PLUGINS, *(record['name'] for record in missing)])}"
        )


def plugin_changes(records: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each plugin whose source differs from the recorded one."""
    return [
        f"plugin {PLUGINS[record['name']]} is not what was recorded, "
        f"{describe_plugin(record['name'], record['version'], record['sha256'])}"
        for record in records
        if record["name"] in PLUGINS and record["sha256"] not in ("", PLUGINS[record["name"]].sha256)
    ]
