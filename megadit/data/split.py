"""Train and validation parts, decided per base name by a hash.

Whether an image is held out depends on its base name alone: not on the run's seed (runs of one study
share their validation images), not on the order or number of images (adding some moves no other), and
not on the version of a package. Variants of one picture share a base name, so they never straddle the
parts. A smaller fraction holds out a subset of what a larger one does.
"""

from __future__ import annotations

from collections.abc import Sequence

from megadit.data.dataset import ImageSet, Subset
from megadit.errors import UserError
from megadit.rng import stream_key

_SPLIT_SEED = 0  # fixed on purpose: see above


def held_out(set_name: str, base: str, fraction: float) -> bool:
    """Whether the pictures with this base name belong to the validation part (``fraction`` of the hash space)."""
    word = stream_key(_SPLIT_SEED, "validation", set_name, base) & 0xFFFFFFFFFFFFFFFF
    return word < fraction * 2.0**64


def split(dataset: ImageSet, bases: Sequence[str], fraction: float, *, labelled: bool) -> tuple[Subset, Subset]:
    """(train, validation) of a set whose image i has base name ``bases[i]``.

    Raises ``UserError`` when the training part would be empty.
    """
    parts: tuple[list[int], list[int]] = ([], [])
    for index, base in enumerate(bases):
        parts[held_out(dataset.name, base, fraction)].append(index)
    if not parts[0]:
        raise UserError(
            f"data.val_fraction: {fraction} holds out all {len(bases)} images of {dataset.name}; "
            "lower it, 0 holds out none"
        )
    return Subset(dataset, tuple(parts[0]), labelled), Subset(dataset, tuple(parts[1]), labelled)
