"""Files that no package holds, such as the scripts of benchmarks/, as modules that a test calls in its own process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def import_script(path: str | Path) -> ModuleType:
    """The script at ``path``, relative to the checkout or absolute, as a new module at each call."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
