"""Which images a step sees: global sample numbers, and how ranks and micro batches share them.

Sample numbers 0, 1, 2, ... run over the whole training run. Number s lies in epoch s // N and is the
image permutation_epoch[s mod N]; optimizer step k of batch size B takes the numbers kB ... kB + B - 1,
or, where windows of them are left out (``windows``), those of that rank among the others.
Nothing here depends on how many ranks there are, so a step sees the same images under every layout, and
a run resumes exactly from its step number alone: no state of the order has to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadit.data.windows import Window, remaining_windows
from megadit.errors import UserError
from megadit.rng import permutation, stream_key

_EPOCHS_KEPT = 2  # a batch that ends one epoch and begins the next alternates between two permutations


@dataclass
class SampleOrder:
    """Global sample numbers to indices of a set of ``size`` images, reshuffled every epoch under ``seed``."""

    size: int
    seed: int
    _permutations: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("SampleOrder needs a set with at least one image")

    def epoch(self, number: int) -> int:
        """The epoch (0-based) of a global sample number."""
        return number // self.size

    def indices(self, numbers: Tensor | Sequence[int]) -> list[int]:
        """Indices into the set, one per global sample number (numbers may span several epochs)."""
        values = torch.as_tensor(numbers, dtype=torch.int64)
        epochs, places = values // self.size, values % self.size
        indices = torch.empty_like(values)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[places[here]]
        return indices.tolist()

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            while len(self._permutations) >= _EPOCHS_KEPT:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[epoch] = permutation(stream_key(self.seed, "order", epoch), self.size)
        return self._permutations[epoch]

    def __getstate__(self) -> dict:
        return {"size": self.size, "seed": self.seed, "_permutations": {}}


@dataclass(frozen=True)
class BatchLayout:
    """How the ``global_batch`` of a step is spread: ``ranks`` data-parallel ranks, ``micro_batch`` images at a time.

    ``left_out``: windows [first, stop) of sample numbers that no step takes, sorted and disjoint.
    """

    global_batch: int
    ranks: int
    rank: int
    micro_batch: int
    left_out: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if min(self.global_batch, self.ranks, self.micro_batch) < 1 or not 0 <= self.rank < self.ranks:
            raise ValueError(f"impossible layout: {self}")
        if self.global_batch % (self.ranks * self.micro_batch):
            raise UserError(
                f"train.global_batch: {self.global_batch} is not a multiple of {self.ranks} data-parallel ranks x "
                f"train.micro_batch {self.micro_batch}; choose a global_batch that is a multiple of "
                f"{self.ranks * self.micro_batch}, or another micro_batch"
            )

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step and rank."""
        return self.global_batch // (self.ranks * self.micro_batch)

    def numbers(self, step: int, micro: int) -> list[int]:
        """Global sample numbers of this rank's micro batch ``micro`` of optimizer step ``step`` (both 0-based)."""
        if not 0 <= micro < self.accumulation:
            raise ValueError(f"micro batch {micro} is not one of the {self.accumulation} of a step")
        start = step * self.global_batch + (micro * self.ranks + self.rank) * self.micro_batch
        return [n for window in remaining_windows(start, self.micro_batch, self.left_out) for n in range(*window)]

    def windows(self, step: int) -> list[Window]:
        """The sample numbers of all ranks in optimizer step ``step``, as windows."""
        return remaining_windows(step * self.global_batch, self.global_batch, self.left_out)

    def next_number(self, step: int) -> int:
        """The number after the last one that the first ``step`` steps take."""
        return self.windows(step - 1)[-1][1] if step else 0

    def newly_skipped(self, step: int) -> list[Window]:
        """The windows between the last sample of the step before ``step`` and the last of ``step``."""
        begin, end = self.next_number(step), self.next_number(step + 1)
        return [window for window in self.left_out if begin <= window[0] < end]
