"""Imports of large libraries, made safe: late, offline, and not brought down by a broken torchvision.

PyPI's torchvision wheel beside a CPU build of torch fails at import (``operator torchvision::nms does not exist``).
diffusers and transformers only look whether it is installed, import it, and fail in turn, though nothing that
megadit uses needs it. So a torchvision that does not import is hidden from this process before they are loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from megadit.errors import UserError


def import_diffusers() -> ModuleType:
    """The ``diffusers`` package. Raises UserError if it is not installed or does not import."""
    return _import_safely("diffusers")


def import_transformers() -> ModuleType:
    """The ``transformers`` package, without its progress bars. Raises UserError as ``import_diffusers`` does."""
    transformers = _import_safely("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def hide_broken_torchvision() -> bool:
    """Make this process behave as without torchvision if it is installed but fails to import; tells whether it did."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception:  # whatever a compiled extension throws: ImportError, RuntimeError, OSError
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # find_spec and import now both say: not there
        return True
    return False


def _import_safely(name: str) -> ModuleType:
    # Everything is loaded from local folders: never wait for a network that may not be there.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hide_broken_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); install it with: pip install {name}") from error
