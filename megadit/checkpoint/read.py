"""Opening a checkpoint: its index, its state and what they say of it. Tensors are read through ``reader``.

``compatibility`` holds it against a run's configuration, ``restore`` fills engines and models, ``inspect`` shows and
verifies it.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megadit.checkpoint.format import FLOAT_BYTES, WEIGHTS, BrokenCheckpoint, Index, Position, check_state, json_problem
from megadit.checkpoint.fragment_reader import FragmentReader
from megadit.checkpoint.names import STATE
from megadit.config import RunConfig
from megadit.config.schema.run import ONLINE
from megadit.data.windows import merge_windows
from megadit.engine.ema import EMA_PREFIX
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.plugins import require_imported


class StoredCheckpoint:
    """An opened checkpoint: its index, its state and its config. Opening it checks the sizes of all of its files.

    Raises:
        BrokenCheckpoint: torn, changed or incomplete, as far as can be seen without reading the tensors.
        UserError: of a newer format, or made with plugins that are not imported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path)
        require_imported(self.index.plugins, f"checkpoint {path}")
        self._check_sizes()
        try:
            text = (path / STATE).read_bytes()
            record = self.index.files.get(STATE)
            if record is not None and zlib.crc32(text) != record.crc32:
                raise ValueError("its checksum is wrong")
            self.state: dict[str, Any] = json.loads(text)
            check_state(self.state)
            self.config = _completed(self.state["config"])
            self.position = Position(*(int(self.state[key]) for key in ("step", "samples_seen", "skipped_steps")))
            # Before samples could be left out the numbers were those of the samples seen.
            samples = self.state.get("samples") or {"next": self.position.samples_seen, "left_out": []}
            self.next_sample = int(samples["next"])
            self.left_out = merge_windows((int(first), int(stop)) for first, stop in samples["left_out"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BrokenCheckpoint(
                f"checkpoint {path}: {STATE} cannot be read ({json_problem(error, path / STATE)}); use an earlier one"
            ) from error

    def _check_sizes(self) -> None:
        """The sizes that the index says; version 1 says none, but its files hold at least all of its weights."""
        for name, record in self.index.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != record.bytes:
                problem = "is missing" if size is None else f"has {size} bytes of {record.bytes}"
                other = file_instead(file, "safetensors", "json")
                problem += f" ({other})" if other is not None else ""
                raise BrokenCheckpoint(f"checkpoint {self.path}: {name} {problem}; use an earlier one")
        needed = sum(math.prod(shape) for shape in self.parameters.values()) * FLOAT_BYTES
        files = [self.path / name for name in dict.fromkeys(fragment.file for fragment in self.index.fragments)]
        stored = sum(file.stat().st_size for file in files if file.is_file())
        if stored < needed:
            raise BrokenCheckpoint(
                f"checkpoint {self.path}: its files have {stored} bytes, its weights {needed}; use an earlier one"
            )

    @property
    def parameters(self) -> dict[str, list[int]]:
        """Global shape of every parameter."""
        return self.index.parameters

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of the parameters: weights, exp_avg, exp_avg_sq, ema/NAME, …"""
        return tuple(dict.fromkeys(fragment.kind for fragment in self.index.fragments))

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the stored moving averages."""
        return tuple(kind.removeprefix(EMA_PREFIX) for kind in self.kinds if kind.startswith(EMA_PREFIX))

    def reader(self) -> FragmentReader:
        """Opens the tensors; to be used in a ``with``."""
        index = self.index
        return FragmentReader(self.path, index.parameters, index.fragments, index.files, index.block)

    def kind_of(self, weights: str) -> str:
        """The kind of the online weights or of a moving average.

        Raises:
            UserError: there is no such average; those that there are are named.
        """
        if weights not in (ONLINE, *self.averages):
            raise UserError(
                f"weights '{weights}': checkpoint {self.path} holds {', '.join((ONLINE, *self.averages))}; "
                "choose one of these"
            )
        return WEIGHTS if weights == ONLINE else EMA_PREFIX + weights


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of keys that are younger than it; as it is where it is no longer valid."""
    try:
        return RunConfig.model_validate_json(json.dumps(stored)).model_dump(mode="json")
    except ValidationError:
        return stored
