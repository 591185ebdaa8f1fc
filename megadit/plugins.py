"""Plugins: Python modules of users that add to megadit's registries. See megadit/extensions.py, docs/extending.md.

A module is imported for one of two reasons: the command line names it (``--plugins``), or the ``--config`` that is
given to training or to a sweep does. What an artefact (run directory, checkpoint, study, exported weights) or a base of
a configuration says of plugins is compared with what was imported, and is never a reason to import.
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
    """Import the modules and let each register what it brings; those that are there already are passed over.

    They are looked for where Python looks for modules, and last in the current folder. ``source`` is what messages call
    the place that names them.

    Raises:
        UserError: one is no module's name, is missing, fails, has no ``register()``, or takes a name that is taken.
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
        place = getattr(module, "__file__", None) or "no file of Python's"
        raise UserError(
            f"{source}: {name} ({place}) is no plugin: it has no register(); docs/extending.md has examples"
        )
    try:
        register()
    except UserError as error:
        raise UserError(f"{source}: {name} cannot be registered: {error}") from error
    except Exception as error:
        raise UserError(f"{source}: {name} cannot be registered ({_error_with_line(error)})") from error
    return Plugin(name, _version(module), _digest(module))


def _search_current_folder_last() -> None:
    """Let modules be found in the current folder after everywhere else, whatever started this process.

    ``python -m`` puts the folder first, where a file of it would shadow an installed package; a script leaves it out.
    """
    here = os.getcwd()
    named = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if here in named:
        return
    sys.path[:] = [*(part for part in sys.path if part not in ("", here)), here]


def _error_with_line(error: BaseException) -> str:
    """An exception with the line that raised it, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    of_import = (__file__, "<frozen", os.path.dirname(importlib.__file__))
    own = [frame for frame in frames if not frame.filename.startswith(of_import)]
    place = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return place + " ".join(f"{type(error).__name__}: {error}".split())


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
    found = sorted(file.parent.rglob("*.py")) if package is not None else [file]
    total = hashlib.sha256()
    try:
        for path in found:
            content = path.read_bytes()
            total.update(f"{path.relative_to(file.parent).as_posix()}\0{len(content)}\0".encode())
            total.update(content)
    except OSError as error:
        raise UserError(f"--plugins: '{path}' cannot be read ({error.strerror}); a plugin needs its source") from error
    return total.hexdigest()


def describe_plugin(name: str, version: str, sha256: str) -> str:
    """A plugin in a sentence: ``toy 1.2 (sha256 0123456789ab)``."""
    text = f"{name} {version}".rstrip()
    return f"{text} (sha256 {sha256[:_SHORT]})" if sha256 else text


def plugin_records(values: Any) -> list[dict[str, str]]:
    """What ``plugins`` of a file holds, names and records alike, as name, version and sha256.

    Raises:
        UserError: it is no list of these.
    """
    if not isinstance(values, list | tuple):
        raise UserError(f"plugins: {str(values)[:60]!r} is not a list of modules; write plugins: [my_plugin]")
    found = []
    for value in values:
        record = value if isinstance(value, Mapping) else {"name": value}
        if (
            not isinstance(record.get("name"), str)
            or not record["name"]
            or record.keys() - {"name", "version", "sha256"}
        ):
            raise UserError(f"plugins: {str(value)[:60]!r} is not the name of a module; write plugins: [my_plugin]")
        found.append({key: str(record.get(key) or "") for key in ("name", "version", "sha256")})
    return found


def require_imported(records: Sequence[Mapping[str, str]], source: str) -> None:
    """Refuse what was made with plugins that this process has not imported; nothing is imported for it.

    Raises:
        UserError: naming the module, its version and the option.
    """
    missing = [record for record in records if record["name"] not in PLUGINS]
    if missing:
        told = " and ".join(describe_plugin(record["name"], record["version"], "") for record in missing)
        raise UserError(
            f"plugins: {source} names {told}, and reading it imports nothing; if you trust the module, give --plugins "
            f"{','.join([*PLUGINS, *(record['name'] for record in missing)])}"
        )


def plugin_changes(records: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each plugin that is imported with other sources than recorded."""
    return [
        f"plugin {PLUGINS[record['name']]} is not what was recorded, "
        f"{describe_plugin(record['name'], record['version'], record['sha256'])}"
        for record in records
        if record["name"] in PLUGINS and record["sha256"] not in ("", PLUGINS[record["name"]].sha256)
    ]
