"""What a checkpoint of any format holds: named parameters, their values by kind, and where the training stood.

Values are looked at while they pass from reader to writer, for those that are not finite, or not in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadit.checkpoint.format import WEIGHTS, Position
from megadit.config import ModelConfig, RunConfig
from megadit.convert.deferred import deferred, loaded
from megadit.convert.torch_files.safe_load import odd_kind
from megadit.engine.deepspeed.partitions import MOMENTS
from megadit.errors import UserError
from megadit.finite import NonFiniteCounts

if TYPE_CHECKING:
    from megadit.convert.diffusers.difference import Difference

Part = tuple[int, Tensor]  # first element in the flattened parameter, and 1-D values from there on


@dataclass(frozen=True)
class Contents:
    """An opened checkpoint. ``read(kind, name)`` gives the parts of a parameter, deferred where that spares memory.

    ``description`` is what messages call it. ``groups`` is the table of another program's optimizer groups, which is
    reported and never used. ``adam_step`` counts the updates behind the moments. ``config`` is None where the format
    has none; ``model`` is then what the weights themselves say, if they say it, and ``known`` what else the source
    says, by section. ``extras`` are buffers of the model by name, such as PixArt's null caption; ``classes`` are names
    by label.
    ``difference`` is how far the model here is from the class in diffusers that it was read from.
    """

    description: str
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
    difference: Difference | None = None

    @classmethod
    def of_weights(cls, description: str, state: Mapping[str, Tensor], **fields: Any) -> Contents:
        """Contents of weights alone, which are there by name, deferred or in memory."""

        def read(kind: str, name: str) -> list[Part]:
            return [(0, state[name].reshape(-1))]

        return cls(description, {name: tuple(value.shape) for name, value in state.items()}, (WEIGHTS,), read, **fields)

    @property
    def has_moments(self) -> bool:
        """Whether Adam's state is there, without which a run cannot be resumed."""
        return set(MOMENTS) <= set(self.kinds)

    @property
    def weights_only_notes(self) -> list[str]:
        """What a writer of weights alone says."""
        return ["weights only: this format holds no optimizer state"] if self.has_moments else []

    def weights_only(self, reason: str) -> Contents:
        """The same without optimizer state; ``reason`` becomes a note."""
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
                f"{self.description}: its {kind} of '{name}' are not the {total} elements of "
                f"{list(self.shapes[name])}; copy the whole checkpoint, or use an earlier one"
            )
        return parts

    def tensor(self, kind: str, name: str) -> Tensor:
        """A parameter's values in its shape, float32, in memory; not to be changed."""
        parts = [loaded(values).detach().to(torch.float32) for _, values in self.parts(kind, name)]
        if not parts:  # of a parameter without elements
            return torch.zeros(self.shapes[name])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shapes[name])

    def deferred(self, kind: str, name: str) -> Tensor:
        """``tensor``, read when it is needed."""
        return deferred(self.shapes[name], torch.float32, lambda: self.tensor(kind, name))

    def state_dict(self) -> dict[str, Tensor]:
        """All weights in float32, each read when it is needed, and the buffers that the source holds."""
        return {name: self.deferred(WEIGHTS, name) for name in self.shapes} | dict(self.extras)


def group_facts(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """One phrase per optimizer group that has a learning rate or weight decay: its name or number, and these."""
    facts = []
    for number, group in enumerate(groups):
        known = [f"{key} {group[key]:g}" for key in ("lr", "weight_decay") if isinstance(group.get(key), int | float)]
        if known:
            facts.append(f"{group.get('name') or f'group {number}'}: {', '.join(known)}")
    return facts


class ValueCheck:
    """Looks at every tensor that is read, once, whatever is made of it afterwards."""

    def __init__(self) -> None:
        self._tally = NonFiniteCounts()
        self._seen: set[tuple[str, int]] = set()

    def watched(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors by name, which are looked at when they are first loaded.

        Raises:
            UserError: a tensor has no values that could be copied: it is sparse, quantized or larger than its memory.
        """
        for name, values in state.items():
            kind = odd_kind(values)
            if kind is not None:
                raise UserError(f"IN: '{name}' is {kind}; save the checkpoint anew with plain tensors")
        return {name: self._watched(name, values, 0) for name, values in state.items()}

    def watched_contents(self, contents: Contents) -> Contents:
        """The same contents, whose values are looked at when they are loaded."""

        def read(kind: str, name: str) -> Sequence[Part]:
            label = name if kind == WEIGHTS else f"{kind} of {name}"
            return [(start, self._watched(label, part, start)) for start, part in contents.read(kind, name)]

        return replace(contents, read=read, extras=self.watched(contents.extras))

    def notes(self, allowed: bool) -> list[str]:
        """What was found, for people, where that is ``allowed``; nothing where all values are finite.

        Raises:
            UserError: there are such values, and they are not allowed.
        """
        counts = str(self._tally)
        if not counts:
            return []
        if allowed:
            return [f"{counts}; they are written as they are, or as infinity where float32 ends"]
        raise UserError(
            f"IN: {counts}; what is computed with them is NaN, so nothing is converted: use an earlier checkpoint, or "
            "convert them as they are with --allow-nonfinite"
        )

    def _watched(self, name: str, values: Tensor, start: int) -> Tensor:
        def load() -> Tensor:
            value: Tensor = loaded(values)
            if (name, start) not in self._seen:  # which is read again where it is cut, or compared with diffusers
                self._seen.add((name, start))
                self._tally.add(name, value)
            return value.contiguous()

        return deferred(values.shape, values.dtype, load)
