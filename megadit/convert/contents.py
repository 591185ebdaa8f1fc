"""What a checkpoint of any format holds: named parameters, their values by kind, and where the training stood."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checkpoint.format import WEIGHTS, Position
from megadit.config import ModelConfig, RunConfig
from megadit.convert.deferred import deferred, loaded
from megadit.convert.request import check_free
from megadit.engine.deepspeed.partitions import MOMENTS
from megadit.errors import UserError
from megadit.files.ownership import own

Part = tuple[int, Tensor]  # first element in the flattened parameter, and 1-D values from there on


@dataclass(frozen=True)
class Contents:
    """An opened checkpoint. ``read(kind, name)`` gives the parts of a parameter, deferred where that spares memory.

    ``what`` describes it to people. ``groups`` is the table of another program's optimizer groups, to be told and
    never used. ``adam_step`` counts the updates behind the moments. ``config`` is None where the format has none;
    ``model`` is then what the weights themselves say, if they say it, and ``known`` what else the source tells, by
    section. ``extras`` are buffers of the model by name, such as PixArt's null caption; ``classes`` names by label.
    """

    what: str
    shapes: Mapping[str, tuple[int, ...]]
    kinds: tuple[str, ...]
    read: Callable[[str, str], Sequence[Part]]
    position: Position = field(default_factory=Position)
    adam_step: int = 0
    loss_scale: dict[str, Any] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    config: RunConfig | None = None
    model: ModelConfig | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def has_moments(self) -> bool:
        """Whether Adam's state is there, without which a run cannot be resumed."""
        return set(MOMENTS) <= set(self.kinds)

    def weights_only(self, reason: str) -> Contents:
        """The same without optimizer state, for a reason that is told."""
        note = f"weights only: {reason}"
        return replace(self, kinds=(WEIGHTS,), adam_step=0, loss_scale={}, notes=(*self.notes, note))

    def parts(self, kind: str, name: str) -> list[Part]:
        """The parts of a parameter in their order, checked to cover it exactly.

        Raises:
            UserError: elements are missing or come twice.
        """
        parts = sorted(((start, values) for start, values in self.read(kind, name)), key=lambda part: part[0])
        total, end = math.prod(self.shapes[name]), 0
        for start, values in parts:
            if start != end:
                break
            end += values.numel()
        if end != total or sum(values.numel() for _, values in parts) != total:
            raise UserError(
                f"{self.what}: its {kind} of '{name}' are not the {total} elements of {list(self.shapes[name])}; "
                "copy the whole checkpoint, or use an earlier one"
            )
        return parts

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's values in its shape, float32, in memory; not to be changed."""
        parts = [loaded(values).detach().to(torch.float32) for _, values in self.parts(kind, name)]
        if not parts:  # of a parameter without elements
            return torch.zeros(self.shapes[name])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shapes[name])

    def deferred(self, kind: str, name: str) -> Tensor:
        """``whole``, read when it is needed."""
        return deferred(self.shapes[name], torch.float32, lambda: self.whole(kind, name))


def group_facts(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """One phrase per optimizer group that has a learning rate or weight decay: its name or number, and these."""
    facts = []
    for number, group in enumerate(groups):
        known = [f"{key} {group[key]:g}" for key in ("lr", "weight_decay") if isinstance(group.get(key), int | float)]
        if known:
            facts.append(f"{group.get('name') or f'group {number}'}: {', '.join(known)}")
    return facts


def save_file(value: Any, path: Path) -> None:
    """``torch.save``, its failures to write told as OSError."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error


@contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """A name beside ``target`` to write to, which becomes ``target`` when all went well and vanishes otherwise.

    Raises:
        UserError: ``target`` holds something already, cannot be written, or another process is writing it.
    """
    check_free(target)
    temporary = target.with_name(f".tmp-{target.name}")  # a writer goes by the ending
    with own(target.parent, "converting", "OUT", name=target.name) as ownership:
        check_free(target)  # which another process may just have written
        try:
            _remove(temporary)
            yield temporary
            ownership.check()
            if target.is_dir():
                target.rmdir()
            temporary.rename(target)
        except OSError as error:
            raise UserError(
                f"OUT: '{target}' cannot be written ({error.strerror or error}); free space, or choose another place"
            ) from error
        finally:
            if ownership.holds():
                _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
