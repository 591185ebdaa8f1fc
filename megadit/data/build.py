"""``build_datasets``: from the ``data`` section of a configuration to the training and validation sets."""

from __future__ import annotations

from megadit.config import DataConfig
from megadit.data.dataset import ImageSet, Subset, WholeSet
from megadit.data.split import split
from megadit.extensions import DATA_SOURCES


def build_datasets(config: DataConfig, num_classes: int | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, validation); the second may be empty. Without ``condition: class`` the sets have no classes.

    ``num_classes``: the model's, against which labels that are numbers are held; None: not known.

    Raises ``UserError`` when files or packages are missing or damaged, or nothing would be left to train on.
    """
    return _parts(config, _whole(config, num_classes), config.val_fraction)


def whole_set(config: DataConfig) -> tuple[Subset, list[str]]:
    """All images (of ``data.classes``) in the set's own order, nothing held out, and the base name of each.

    Raises ``UserError`` as ``build_datasets`` does.
    """
    whole = _whole(config, None)
    part, _ = _parts(config, whole, 0.0)
    return part, [whole.bases[i] for i in part.indices]


def _whole(config: DataConfig, num_classes: int | None) -> WholeSet:
    known = None if config.classes is not None else num_classes  # data.classes chooses some of the set's
    whole: WholeSet = DATA_SOURCES.get(config.name).load(config, known)
    return whole


def _parts(config: DataConfig, whole: WholeSet, fraction: float) -> tuple[Subset, Subset]:
    return split(whole, whole.bases, fraction, labelled=config.condition == "class", classes=config.classes)
