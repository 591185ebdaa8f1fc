"""Inert placeholders for the plain classes that torch files name beside their tensors, and why other files are refused.

A pickle names classes and functions, which loading calls. A placeholder has the place of one and does nothing: its
"constructor" keeps the values it is given, or gives an empty container. So settings of trainers (omegaconf, argparse,
paths, NumPy's numbers, optimizers' and schedulers' objects) do not stand in the way of the weights beside them, none
of their code is imported or run, and none of these libraries is needed. Only classes of the libraries in the table are
passed over so; whatever else a file names is refused by its name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from megadit.files.file_kind import file_instead
from megadit.files.folder_kind import folder_instead

_HEAD_BYTES = 2**22  # of a torch file, where its pickle stands; the tensors follow
_DCP = ".distcp"
_MODULES = b"torch.nn.modules."
_NUMBER = re.compile(r"[?bhilqBHILQefdc]|[biufc]\d{1,2}")  # NumPy's codes of plain numbers


class Placeholder:
    """The attributes of an object whose class is not loaded."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)  # of __dict__, and of __slots__
        if any(part is not None and not isinstance(part, dict) for part in parts):
            parts = ({"state": state},)
        for part in parts:
            self.__dict__.update(part or {})


class PlaceholderInt(int):
    """The number behind a member of an enumeration."""


class PlaceholderDict:
    """In the place of a class of dicts: makes plain ones."""

    def __new__(cls, *values: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """An empty dict, which is filled by the file."""
        return OrderedDict()


class PlaceholderList:
    """In the place of a class of lists: makes plain ones."""

    def __new__(cls, *values: Any) -> list[Any]:  # type: ignore[misc]
        """An empty list, which is filled by the file."""
        return []


def numpy_number(kind: Any = None, data: Any = None) -> Any:
    """A number of NumPy as Python's, in the place of its ``scalar``; a placeholder where it is no plain number."""
    code = kind.values[0] if isinstance(kind, Placeholder) and kind.values else None
    if isinstance(code, str) and _NUMBER.fullmatch(code) and isinstance(data, bytes):
        state = getattr(kind, "state", None)
        big = isinstance(state, tuple) and state[1:2] == (">",)
        try:
            values = np.frombuffer(data, np.dtype(code).newbyteorder(">" if big else "<"))
        except (TypeError, ValueError):
            return Placeholder(kind, data)
        if len(values) == 1:
            return values[0].item()
    return Placeholder(kind, data)


_DICTS = re.compile(
    r"collections\.defaultdict|easydict\.EasyDict|addict\.(?:addict\.)?Dict|yacs\.config\.CfgNode|"
    r"(?:mmcv|mmengine)\.[\w.]*ConfigDict|diffusers\.configuration_utils\.FrozenDict|"
    r"(?:pytorch_lightning|lightning|lightning_fabric)\.[\w.]*AttributeDict"
)
_LISTS = re.compile(r"collections\.deque")
_NUMPY = re.compile(r"numpy\.(?:core|_core)\.multiarray\.scalar")
_STAGE = "deepspeed.runtime.zero.config.ZeroStageEnum"
_CLASSES = re.compile(
    r"deepspeed\.(?:utils\.tensor_fragment\.fragment_address|runtime\.fp16\.loss_scaler\.\w*LossScaler)|"
    r"argparse\.Namespace|types\.SimpleNamespace|"  # DiT's train.py keeps its command line in every checkpoint
    r"pathlib(?:\._local)?\.\w*Path|datetime\.\w+|uuid\.UUID|decimal\.Decimal|fractions\.Fraction|"
    r"typing\.\w+|builtins\.(?:bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)|"
    r"numpy\.(?:dtype|ndarray|dtypes\.\w+|(?:core|_core)\.multiarray\._reconstruct|(?:u?int|float|bool)\d*_?)|"
    r"numpy\.random\.[\w.]+|torch\.(?:device|optim\.[\w.]+|cuda\.amp\.grad_scaler\.\w+|amp\.grad_scaler\.\w+)|"
    r"torch\.distributed\.[\w.]*(?:StateDictType|ShardingStrategy|BackwardPrefetch|MixedPrecision|CPUOffload)|"
    r"(?:omegaconf|antlr4|ml_collections|hydra|yacs|easydict|addict|mmcv|mmengine)\.[\w.]+|"
    r"(?:pytorch_lightning|lightning|lightning_fabric|lightning_utilities)\.[\w.]+|"
    r"(?:transformers|accelerate)\.[\w.]*(?:Arguments|Config|Strategy|Type|State|Plugin|HubStrategy)"
)


def placeholder_for(name: str) -> Any | None:
    """What has the place of the class or function ``name`` of a file; None if it is refused."""
    if name == _STAGE:
        return PlaceholderInt
    if _NUMPY.fullmatch(name):
        return numpy_number
    for pattern, made in ((_DICTS, PlaceholderDict), (_LISTS, PlaceholderList), (_CLASSES, Placeholder)):
        if pattern.fullmatch(name):
            return made
    return None


def refused_name(error: Exception) -> str | None:
    """The class or function that torch refuses to load, by its full name."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return None
    return named[1] if "." in named[1] else f"builtins.{named[1]}"  # torch leaves that out


def unreadable(path: Path, error: Exception) -> str:
    """Why a torch file is refused, with what to do."""
    name, reason = refused_name(error), str(error)
    if name is not None:
        remedy = "save the checkpoint anew without it (client_state is where such objects come from)"
        why = ""
        if _holds_modules(path):
            why = ": the file holds a whole model and not its weights alone"
            remedy = "in the program that made it, torch.save(model.state_dict(), FILE), and give that file"
        elif "mp_rank" not in path.name:
            remedy = "in the program that made it, save the weights alone: torch.save(model.state_dict(), FILE)"
        return (
            f"{path}: holds an object of '{name}', which is not data and could run anything when loaded{why}; {remedy}"
        )
    if "TorchScript" in reason:
        return (
            f"{path}: is a program of TorchScript and not weights; where its model is, save its state_dict() by "
            "torch.save"
        )
    if "DTensor" in reason or "DeviceMesh" in reason:
        return (
            f"{path}: holds a rank's parts of tensors (DTensor, of FSDP 2 or tensor parallelism); save the whole ones: "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    if path.suffix == _DCP and (other := folder_instead(path.parent)) is not None:
        return f"{path}: is no checkpoint alone: its folder {other}"
    if "Unsupported operand" in reason and file_instead(path, "torch", "old-torch") is None:
        return (
            f"{path}: is pickled by another protocol than torch's own (pickle_protocol of torch.save), which is not "
            "read here; in the program that made it, save it without that option"
        )
    other = file_instead(path, "torch", "old-torch")
    if other is not None:
        return f"{path}: cannot be read as a torch file: {other}"
    reason = reason.partition("\n")[0].partition(". ")[0].strip("'\". ") or type(error).__name__
    return f"{path}: cannot be read as a torch file ({reason}); copy it again, or use an earlier checkpoint"


def _holds_modules(path: Path) -> bool:
    """Whether a torch file names the classes of torch's modules, as pickled models do."""
    try:
        with open(path, "rb") as file:
            return _MODULES in file.read(_HEAD_BYTES)
    except OSError:
        return False
