"""Imports of large libraries, made safe and cheap: late, offline, without what nothing here needs of them.

PyPI's torchvision wheel beside a CPU build of torch fails at import (``operator torchvision::nms does not exist``).
diffusers and transformers only look whether it is installed, import it, and fail in turn, though nothing that
megadit uses needs it. So a torchvision that does not import is hidden from this process before they are loaded.

torch's compiler (``torch._dynamo`` and sympy: three seconds of CPU) is imported by the first optimizer, by many
functions on the meta device and by diffusers, whether anything is compiled or not. What is done here leaves it out
until something is.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from megadit.errors import UserError

_COMPILER = "torch._dynamo"
_DISABLED = "__dynamo_disable"  # where torch's decorator keeps what the compiler gave it


def import_diffusers() -> ModuleType:
    """The ``diffusers`` package. Raises UserError if it is not installed or does not import.

    It is imported without torch's compiler, which it would have look into its own models' layers, and without scipy,
    which gives its schedulers a spacing of sigmas (beta) that is not used here: four seconds of CPU.
    """
    with _hidden(_COMPILER), _hidden("scipy"):
        return _import_safely("diffusers")


def import_transformers() -> ModuleType:
    """The ``transformers`` package, without its progress bars. Raises UserError as ``import_diffusers`` does."""
    transformers = _import_safely("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def hide_broken_torchvision() -> bool:
    """Hide a torchvision that is installed but fails to import from this process. Returns whether it did."""
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


def defer_compiler() -> None:
    """Let functions that torch keeps out of compiled code run without importing the compiler, until it is imported.

    torch marks some hundred functions (of optimizers, of the meta device, of dispatch modes) by a decorator whose first
    call imports the compiler to ask it for a version that it does not look into. Where nothing is compiled that version
    is the function itself, and so it is called. As soon as the compiler is there, torch's own way is taken again.
    Functions of modules that are imported later are not covered, and none with a torch that does this in another way.
    """
    import torch

    if _COMPILER in sys.modules:
        return
    _defer_in_step(torch.optim.Adam)  # AdamW's, too
    decorated = getattr(torch.optim.Optimizer.zero_grad, "__code__", None)  # one of them: all share this code
    if decorated is None or decorated.co_filename != getattr(sys.modules.get("torch._compile"), "__file__", None):
        return
    position = decorated.co_freevars.index("fn") if "fn" in decorated.co_freevars else None
    if position is None:
        return
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__ is decorated:
            assert function.__closure__ is not None  # it has free variables
            plain = function.__closure__[position].cell_contents  # __wrapped__ may be what a decorator below it wraps
            if not hasattr(plain, _DISABLED):
                setattr(plain, _DISABLED, _until_imported(function, plain))


def _defer_in_step(optimizer: type) -> None:
    """The same for an optimizer's step, which imports the compiler to part its graph in two."""
    torchs = vars(optimizer).get("step")
    code = getattr(torchs, "__code__", None)
    if torchs is None or code is None or code.co_name != "_use_grad":
        return
    import torch

    @functools.wraps(torchs)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if sys.modules.get(_COMPILER) is not None:
            return torchs(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return torchs.__wrapped__(self, *args, **kwargs)

    optimizer.step = step  # type: ignore[attr-defined]


def _until_imported(decorated: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if sys.modules.get(_COMPILER) is None:
            return plain(*args, **kwargs)
        if getattr(plain, _DISABLED, None) is call:
            delattr(plain, _DISABLED)
        return decorated(*args, **kwargs)

    return call


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Inside, ``import name`` raises ImportError, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules.get(name, name) is None:
            del sys.modules[name]


def _import_safely(name: str) -> ModuleType:
    # Everything is loaded from local folders: never wait for a network that may not be there.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hide_broken_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); install it with: pip install {name}") from error
