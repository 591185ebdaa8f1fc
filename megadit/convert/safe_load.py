"""Reading torch files that other programs wrote, without running anything that they hold.

``torch.load(weights_only=True)`` builds tensors and plain containers. DeepSpeed's files also hold objects of a few of
its own classes, and those of DiT's train.py its arguments. Each class is named here and becomes an inert stand-in, so
that neither its code nor DeepSpeed is needed.
Whatever else a file names is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megadit.errors import UserError

_ZIP = b"PK\x03\x04"  # how a torch file begins that can be mapped; those before torch 1.6 cannot


class StandIn:
    """The attributes of an object whose class is not loaded."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class StandInNumber(int):
    """The number behind a member of an enumeration."""


_STAND_INS: list[Any] = [
    (StandInNumber, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StandIn, "argparse.Namespace"),  # DiT's train.py keeps its command line in every checkpoint
]


def load_file(path: Path) -> Any:
    """What a torch file holds; tensors stay in the file until they are used.

    Raises:
        UserError: no such file, one that cannot be read, or one that holds more than data.
    """
    try:
        with open(path, "rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy the whole checkpoint") from None
    except Exception as error:  # a file can be broken in ways that raise anything at all
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is not None:
            raise UserError(
                f"{path}: holds an object of '{named[1]}', which is not data and could run anything when loaded; save "
                "the checkpoint anew without it (client_state is where such objects come from)"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0].strip("'\". ") or type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a torch file ({reason}); copy it again, or use an earlier checkpoint"
        ) from error
