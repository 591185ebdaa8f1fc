"""Trying a layout without its ranks: on the meta device collectives are noted where they would be sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


def ring_bytes(kind: Kind, size: int, ranks: int) -> float:
    """Bytes that each of ``ranks`` ranks sends, at least, for a collective over a whole tensor of ``size`` bytes.

    ``size`` is that of the larger side: what is summed, gathered, or scattered. A sum costs both of the others
    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009).
    """
    return size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


@dataclass
class Rehearsal:
    """Stands for the process group of a ``TensorLayout`` on the meta device: nothing is sent, every call is noted.

    ``calls``: how often a collective of a kind over a whole tensor of so many bytes was called for.
    """

    calls: Counter[tuple[Kind, int]] = field(default_factory=Counter)

    def note(self, kind: Kind, size: int) -> None:
        """A collective over a tensor of ``size`` bytes (see ``ring_bytes``)."""
        self.calls[kind, size] += 1

    def taken(self) -> Counter[tuple[Kind, int]]:
        """The calls since the last time."""
        calls, self.calls = self.calls, Counter()
        return calls
