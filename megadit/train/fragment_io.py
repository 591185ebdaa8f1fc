"""Reading and writing named fragments of float32 tensors as safetensors files.

The writer streams: it holds one fragment at a time on the host, where ``safetensors.torch.save_file`` would
hold all of a rank's bytes once more. The files are ordinary safetensors files.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.errors import UserError

_BYTES = 4  # float32


@dataclass(frozen=True)
class Piece:
    """Where elements [start, stop) of the flattened tensor ``name`` of ``kind`` (weights, exp_avg, …) lie."""

    kind: str
    name: str
    start: int
    stop: int
    file: str

    @property
    def key(self) -> str:
        """The tensor's key in its safetensors file."""
        return f"{self.kind}/{self.name}@{self.start}"


def write_pieces(path: Path, pieces: Sequence[tuple[Piece, Tensor]]) -> None:
    """Write 1-D float32 tensors, one after the other, and flush them to the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for piece, values in pieces:
        end = position + values.numel() * _BYTES
        header[piece.key] = {"dtype": "F32", "shape": [values.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, values in pieces:
            file.write(values.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


class PieceReader:
    """Reads any index range of any stored tensor, whatever ranges it was written in."""

    def __init__(self, folder: Path, pieces: Iterable[Piece]) -> None:
        self._folder = folder
        self._by_tensor: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        for piece in pieces:
            self._by_tensor[piece.kind, piece.name].append(piece)
        for parts in self._by_tensor.values():
            parts.sort(key=lambda p: p.start)
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._files.clear()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            from safetensors import SafetensorError, safe_open

            path = self._folder / name
            try:
                self._files[name] = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"checkpoint {path}: cannot be read ({error}); resume from an earlier one") from error
        return self._files[name]

    def read_into(self, target: Tensor, kind: str, name: str, start: int = 0) -> None:
        """Fill the 1-D ``target`` with elements ``start`` onward of the stored tensor.

        Raises:
            UserError: the tensor, or a part of the range, is not in the checkpoint.
        """
        stop, filled = start + target.numel(), 0
        for piece in self._by_tensor.get((kind, name), ()):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                part = self._open(piece.file).get_slice(piece.key)[low - piece.start : high - piece.start]
                target[low - start : high - start].copy_(part)
                filled += high - low
        if filled != target.numel():
            raise UserError(
                f"checkpoint {self._folder}: {kind} of '{name}' covers {filled} of {target.numel()} elements in "
                f"[{start}, {stop}); it is of another model or incomplete"
            )


def piece_to_json(piece: Piece) -> dict[str, Any]:
    """A plain dict for the index."""
    return asdict(piece)
