"""Plugins in a test's own process: written into a folder that is looked in, and taken back afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from megadit import extensions
from megadit.extensions import PLUGINS
from megadit.registry import Registry

OWN = {"toy_plugin", "other_plugin", "broken_plugin", "toy_family"}  # what the tests call theirs
REGISTRIES = [value for value in vars(extensions).values() if isinstance(value, Registry)]


@contextlib.contextmanager
def plugins_taken_back() -> Iterator[None]:
    """In the block plugins may be loaded; after it registries, modules and the path are as they were."""
    before, modules, path = dict(PLUGINS), set(sys.modules), list(sys.path)
    added = {registry: set(registry.added()) for registry in REGISTRIES}
    try:
        yield
    finally:
        for registry, names in added.items():
            for name in set(registry.added()) - names:
                registry.discard(name)
        PLUGINS.clear()
        PLUGINS.update(before)
        for name in set(sys.modules) - modules:
            if name.split(".")[0] in OWN:
                del sys.modules[name]
        sys.path[:] = path


def write_plugin(folder: Path, text: str, name: str = "toy_plugin") -> Path:
    """A plugin of one file, which leaves ``imported`` beside it when it is imported."""
    file = folder / f"{name}.py"
    marker = f"from pathlib import Path\nPath({str(folder / 'imported')!r}).write_text('yes')\n"
    file.write_text(marker + text, encoding="utf-8")
    return file
