"""Reading torch files that other programs wrote, without running anything that they hold.

``torch.load(weights_only=True)`` builds tensors and plain containers. Objects of plain classes that trainers keep
beside them become inert placeholders, so that neither their code nor their libraries are needed. Whatever else a file
names is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.convert.deferred import DeferredTensor, deferred
from megadit.convert.torch_files.placeholders import placeholder_for, refused_name, unreadable
from megadit.errors import UserError

_CLASSES = 200  # that one file may name, beside torch's
_DEPTH = 50  # of containers in containers whose tensors are deferred; weights stand higher up
_ZIP = b"PK\x03\x04"  # how a torch file begins that can be mapped; those before torch 1.6 cannot
_UNPACKED = 50  # times the size of a compressed file that it may become


def load_file(path: Path) -> Any:
    """What a torch file holds; tensors stay in the file until they are used.

    Raises:
        UserError: no such file, one that cannot be read, or one that holds more than data.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; give a torch file")
        return _load(path, is_mapped(path))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy the whole checkpoint") from None
    except Exception as error:  # a file can be broken in ways that raise anything at all
        raise UserError(unreadable(path, error)) from error


def _load(path: Path, mapped: bool) -> Any:
    """``torch.load`` with a placeholder for each plain class that the file names, one more at each try."""
    placeholders: list[Any] = []
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(placeholders):
                warnings.simplefilter("ignore")  # of other protocols of pickles, which read or are refused
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:
            name = refused_name(error)
            made = None if name is None else placeholder_for(name)
            if made is None or (made, name) in placeholders or len(placeholders) == _CLASSES:
                raise
            placeholders.append((made, name))


def is_mapped(path: Path) -> bool:
    """Whether ``load_file`` maps the file, so that its tensors are read from it when they are used.

    A file that was unpacked and zipped anew may be compressed. torch maps it all the same and takes the compressed
    bytes for values; read as a whole it is right.

    Raises:
        UserError: it is compressed to so little that it may be made to fill memory.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # which torch tells of
        return True
    if all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
        return True
    unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > _UNPACKED * size:
        raise UserError(
            f"{path}: is compressed, and its {size:,} bytes would be {unpacked:,}, which weights do not become; unpack "
            "it, and zip it again without compression (zip -0)"
        )
    return False


def load_deferred(path: Path) -> Any:
    """``load_file`` with every tensor deferred: a copy is made when its values are needed, and nothing stays mapped in.

    Raises:
        UserError: as ``load_file`` does.
    """
    values = load_file(path)
    return _deferred(values, is_mapped(path), {}, 0)


def _deferred(values: Any, mapped: bool, done: dict[int, Any], depth: int) -> Any:
    """``values`` with deferred tensors down to ``_DEPTH``. ``done`` holds the copy of each container by its id: one
    that stands in many places, or in itself, is walked through once."""
    if isinstance(values, Tensor):
        return streamed(values, mapped)
    if id(values) in done or depth > _DEPTH:
        return done.get(id(values), values)
    if isinstance(values, dict):
        copy = done[id(values)] = {}
        copy.update((key, _deferred(value, mapped, done, depth + 1)) for key, value in values.items())
    elif type(values) in (list, tuple):
        done[id(values)] = type(values)(_deferred(value, mapped, done, depth + 1) for value in values)
    return done.get(id(values), values)


def streamed(values: Tensor, mapped: bool = True) -> Tensor:
    """A tensor of ``load_file``, copied when it is needed; ``mapped`` pages are given back after that.

    Tensors that are not plain numbers in memory (``odd_kind``) stay as they are.
    """
    values = values.detach()
    if odd_kind(values) is not None:
        return values

    def load() -> Tensor:
        if not mapped:
            return values.contiguous()
        copy = values.clone(memory_format=torch.contiguous_format)
        _give_back(values)
        return copy

    return deferred(values.shape, values.dtype, load)


def odd_kind(values: Tensor) -> str | None:
    """What is unusual in a tensor, so that its values cannot just be copied; None for a plain one."""
    if isinstance(values, DeferredTensor):
        return None
    if values.device.type != "cpu":
        return f"without values (on {values.device})"
    if values.is_quantized:
        return "quantized"
    if values.layout != torch.strided:
        return str(values.layout).removeprefix("torch.")
    if values.nbytes > values.untyped_storage().nbytes():  # a few bytes can stand for any size
        return "a view that repeats its values"
    return None


def _give_back(values: Tensor) -> None:
    """Let go of the mapped pages that only hold ``values``; they are read again when they are needed again."""
    if not sys.platform.startswith("linux") or not values.is_contiguous():
        return
    page = mmap.PAGESIZE
    first = -(-values.data_ptr() // page) * page
    last = (values.data_ptr() + values.nbytes) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
