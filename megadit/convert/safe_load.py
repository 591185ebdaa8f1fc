"""Reading torch files that other programs wrote, without running anything that they hold.

``torch.load(weights_only=True)`` builds tensors and plain containers. Objects of plain classes that trainers keep
beside them become inert stand-ins, so that neither their code nor their libraries are needed. Whatever else a file
names is refused.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from megadit.convert.stand_ins import refused_name, stand_in, unreadable
from megadit.errors import UserError

_CLASSES = 200  # that one file may name, beside torch's
_ZIP = b"PK\x03\x04"  # how a torch file begins that can be mapped; those before torch 1.6 cannot


def load_file(path: Path) -> Any:
    """What a torch file holds; tensors stay in the file until they are used.

    Raises:
        UserError: no such file, one that cannot be read, or one that holds more than data.
    """
    try:
        with open(path, "rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP
        return _load(path, mapped)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy the whole checkpoint") from None
    except Exception as error:  # a file can be broken in ways that raise anything at all
        raise UserError(unreadable(path, error)) from error


def _load(path: Path, mapped: bool) -> Any:
    """``torch.load`` with a stand-in for each plain class that the file names, one more at each try."""
    stand_ins: list[Any] = []
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")  # of other protocols of pickles, which read or are refused
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:
            name = refused_name(error)
            made = None if name is None else stand_in(name)
            if made is None or (made, name) in stand_ins or len(stand_ins) == _CLASSES:
                raise
            stand_ins.append((made, name))
