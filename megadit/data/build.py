"""``build_datasets``: from the ``data`` section of a configuration to the training and validation sets.

Parts are decided per base name by a hash. Whether an image is held out depends on its base name alone: not on the run's
seed (runs of one study share their validation images), not on the order or number of images (adding some moves no
other), and not on the version of a package. Variants of one picture share a base name, so they never straddle the
parts. A smaller fraction holds out a subset of what a larger one does.
"""

from __future__ import annotations

from collections.abc import Sequence

from megadit.config import DataConfig
from megadit.data.dataset import ImageSet, Subset, UnsplitSet
from megadit.data.labels import ClassNames, quoted
from megadit.errors import UserError
from megadit.extensions import DATA_SOURCES
from megadit.rng import stream_key


def build_datasets(config: DataConfig, num_classes: int | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, validation); the second may be empty. Without ``condition: class`` the sets have no classes.

    ``num_classes``: the model's, against which labels that are numbers are held; None: not known.

    Raises ``UserError`` when files or packages are missing or damaged, or nothing would be left to train on.
    """
    return _split(config, _load_source(config, num_classes), config.val_fraction)


def load_unsplit(config: DataConfig) -> tuple[Subset, list[str]]:
    """All images (of ``data.classes``) in the set's own order, nothing held out, and the base name of each.

    Raises ``UserError`` as ``build_datasets`` does.
    """
    dataset = _load_source(config, None)
    images, _ = _split(config, dataset, 0.0)
    return images, [dataset.bases[i] for i in images.indices]


def _load_source(config: DataConfig, num_classes: int | None) -> UnsplitSet:
    known = None if config.classes is not None else num_classes  # data.classes chooses some of the set's
    dataset: UnsplitSet = DATA_SOURCES.get(config.name).load(config, known)
    return dataset


def _split(config: DataConfig, dataset: UnsplitSet, fraction: float) -> tuple[Subset, Subset]:
    return split(dataset, dataset.bases, fraction, labelled=config.condition == "class", classes=config.classes)


_SPLIT_SEED = 0  # fixed on purpose: see above


def held_out(set_name: str, base: str, fraction: float) -> bool:
    """Whether the pictures with this base name belong to the validation part (``fraction`` of the hash space)."""
    word = stream_key(_SPLIT_SEED, "validation", set_name, base) & 0xFFFFFFFFFFFFFFFF
    return word < fraction * 2.0**64


def split(
    dataset: ImageSet,
    bases: Sequence[str],
    fraction: float,
    *,
    labelled: bool,
    classes: Sequence[str] | None = None,
) -> tuple[Subset, Subset]:
    """(train, validation) of a set whose image i has base name ``bases[i]``, of ``classes`` only if given.

    Raises ``UserError`` when a class is not one of the set's or is given twice, or the training part would be empty.
    """
    labels = None if classes is None else _labels(dataset, classes)
    parts: tuple[list[int], list[int]] = ([], [])
    for index, base in enumerate(bases):
        if labels is None or dataset.label(index) in labels:
            parts[held_out(dataset.name, base, fraction)].append(index)
    if not parts[0]:
        raise UserError(
            f"data.val_fraction: {fraction} holds out all {len(parts[1])} images of {dataset.name}; "
            "lower it, 0 holds out none"
        )
    train, validation = (Subset(dataset, tuple(part), labelled, labels) for part in parts)
    return train, validation


def _labels(dataset: ImageSet, chosen: Sequence[str]) -> tuple[int, ...]:
    """The label of each name of ``data.classes``, letter for letter."""
    names = ClassNames(dataset.classes)
    labels = []
    for name in chosen:
        matches = names.same_letters(name)
        if not matches:
            raise UserError(f"data.classes: {name!r} is not a class of {dataset.name}; {_hint(names, name)}")
        if len(matches) > 1:
            raise UserError(
                f"data.classes: {name!r} names {len(matches)} classes of {dataset.name}, {names.listed(matches)}; "
                "rename one of them"
            )
        if matches[0] in labels:
            raise UserError(f"data.classes: {name!r} stands there twice, and is one class of {dataset.name}; keep one")
        labels += matches
    return tuple(labels)


def _hint(names: ClassNames, name: str) -> str:
    if not names.names:
        return "the images have no classes; leave data.classes out"
    in_another_case = names.any_case(name)
    near = names.names[in_another_case[0]] if in_another_case else names.nearest(name, cutoff=0.0)
    parts = [part for part in name.split(",") if part.strip()]
    if len(parts) > 1 and all(names.same_letters(part) for part in parts):
        return f"write a list, data.classes=[{', '.join(quoted(part.strip()) for part in parts)}]"
    return f"did you mean {near!r}?"
