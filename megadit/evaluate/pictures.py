"""Pictures to be scored, from an npz: what ``launch/sample.py --npz`` wrote, in the form that ADM's evaluator reads."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megadit.errors import UserError, one_line
from megadit.files.file_kind import file_instead
from megadit.files.npy import read_header

# An npz of real pictures unpacks to a few times its size; flat colours to a thousand times, which is harmless if small.
# An array is refused that unpacks to more than _LARGE bytes and more than _RATIO times the file.
_RATIO, _LARGE = 100, 2**30


def read_pictures(path: Path) -> Tensor:
    """``arr_0``, uint8 (N, H, W, 3) in the file, as uint8 (N, 3, H, W).

    Raises:
        UserError: there is no such file, it is damaged, holds another array or none, or no pictures.
    """
    remedy = "give what launch/sample.py --npz wrote"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; {remedy}")
    if not zipfile.is_zipfile(path):  # numpy would take anything else for a pickle
        other = file_instead(path, "npz")
        raise UserError(f"{path}: is no npz file{f': {other}' if other else f', or was cut short; {remedy}'}")
    try:
        _check_header(path, remedy)
        with np.load(path, allow_pickle=False) as file:
            pictures = torch.from_numpy(file["arr_0"])
    except KeyError:
        other = file_instead(path, "npz", "zip")
        raise UserError(f"{path}: holds no arr_0{f': {other}' if other else f'; {remedy}'}") from None
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: arr_0 cannot be read ({one_line(error)}); {remedy}") from error
    return pictures.permute(0, 3, 1, 2).contiguous()


def _check_header(path: Path, remedy: str) -> None:
    """Refuse arrays that hold no pictures, or that a small file would unpack to a large size, before unpacking.

    Raises KeyError without arr_0, UserError for other arrays, and what zipfile and numpy say about damage.
    """
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("arr_0.npy")
        with zipfile.Path(archive, entry.filename).open("rb") as stream:
            shape, _, dtype = read_header(stream, entry.file_size)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: arr_0 is not uint8 (N, H, W, 3); {remedy}")
    if 0 in shape:
        raise UserError(f"{path}: arr_0 holds no pictures; {remedy}")
    if entry.file_size > _LARGE and entry.file_size > _RATIO * path.stat().st_size:
        raise UserError(
            f"{path}: its {path.stat().st_size:,} bytes unpack to {entry.file_size:,}, as no real pictures do; {remedy}"
        )
