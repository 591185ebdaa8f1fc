"""Plugins in a test's own process: written into a folder that is looked in, and taken back afterwards."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megadit import extensions
from megadit.extensions import PLUGINS
from megadit.registry import Registry

HOME = Path(__file__).resolve().parents[1] / "plugins"  # of the plugin ``toy``
OWN = {"toy", "toy_plugin", "other_plugin", "broken_plugin"}  # what the tests call theirs
REGISTRIES = [value for value in vars(extensions).values() if isinstance(value, Registry)]


@contextlib.contextmanager
def plugins_taken_back() -> Iterator[None]:
    """In the block plugins may be loaded; after it registries, modules, path and environment are as they were.

    The block begins without the plugins that were loaded before it.
    """
    plugins, path, environment = dict(PLUGINS), list(sys.path), dict(os.environ)
    added = {registry: dict(registry._added) for registry in REGISTRIES}
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OWN}
    for registry, names in added.items():
        for name in names:
            registry.discard(name)
    PLUGINS.clear()
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        sys.modules.update(modules)
        for registry, values in added.items():
            for name in set(registry.added()) - set(values):
                registry.discard(name)
            registry._added.update(values)
        PLUGINS.clear()
        PLUGINS.update(plugins)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def toy_loaded() -> Iterator[None]:
    """In the block the plugin ``toy`` is loaded."""
    from megadit.plugins import load_plugins

    with plugins_taken_back():
        sys.path.insert(0, str(HOME))
        load_plugins(["toy"])
        yield


def write_plugin(folder: Path, text: str, name: str = "toy_plugin") -> Path:
    """A plugin of one file, which leaves ``imported`` beside it when it is imported."""
    file = folder / f"{name}.py"
    marker = f"from pathlib import Path\nPath({str(folder / 'imported')!r}).write_text('yes')\n"
    file.write_text(marker + text, encoding="utf-8")
    return file
