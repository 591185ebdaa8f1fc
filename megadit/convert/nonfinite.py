"""Values that are not finite, or not in float32, found while a checkpoint is converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from megadit.checkpoint.format import WEIGHTS
from megadit.convert.contents import Contents, Part
from megadit.convert.deferred import deferred, loaded
from megadit.convert.torch_files.safe_load import odd_kind
from megadit.errors import UserError
from megadit.finite import Tally


class ValueCheck:
    """Looks at every tensor that is read, once, whatever is made of it afterwards."""

    def __init__(self) -> None:
        self._tally = Tally()
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
        found = str(self._tally)
        if not found:
            return []
        if allowed:
            return [f"{found}; they are written as they are, or as infinity where float32 ends"]
        raise UserError(
            f"IN: {found}; what is computed with them is NaN, so nothing is converted: use an earlier checkpoint, or "
            "convert them as they are with --allow-nonfinite"
        )

    def _watched(self, name: str, values: Tensor, start: int) -> Tensor:
        def load() -> Tensor:
            found: Tensor = loaded(values)
            if (name, start) not in self._seen:  # which is read again where it is cut, or compared with diffusers
                self._seen.add((name, start))
                self._tally.add(name, found)
            return found.contiguous()

        return deferred(values.shape, values.dtype, load)
