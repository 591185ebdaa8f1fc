"""``build_datasets``: from the ``data`` section of a configuration to the training and validation sets."""

from __future__ import annotations

from megadit.config import DataConfig
from megadit.data.dataset import ArraySet, ImageSet, Subset
from megadit.data.sources import digits as digits_set
from megadit.data.sources import emoji as emoji_set
from megadit.data.sources import fashion_mnist as fashion_set
from megadit.data.sources.image_folder import FolderSet, load_folder
from megadit.data.sources.webdataset import TarSet, load_tars
from megadit.data.split import split


def build_datasets(config: DataConfig, num_classes: int | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, validation); the second may be empty. Without ``condition: class`` the sets have no classes.

    ``num_classes``: the model's, against which labels that are numbers are held; None: not known.

    Raises ``UserError`` when files or packages are missing or damaged, or nothing would be left to train on.
    """
    labelled = config.condition == "class"
    whole = _whole(config, labelled, num_classes)
    return split(whole, whole.bases, config.val_fraction, labelled=labelled, classes=config.classes)


def whole_set(config: DataConfig, *, labelled: bool) -> tuple[Subset, list[str]]:
    """All images (of ``data.classes``) in the set's own order, nothing held out, and the base name of each.

    Raises ``UserError`` as ``build_datasets`` does.
    """
    whole = _whole(config, labelled)
    part, _ = split(whole, whole.bases, 0.0, labelled=labelled, classes=config.classes)
    return part, [whole.bases[i] for i in part.indices]


def _whole(config: DataConfig, labelled: bool, num_classes: int | None = None) -> ArraySet | FolderSet | TarSet:
    known = None if config.classes is not None else num_classes  # data.classes chooses some of the set's
    if config.name == "image-folder":
        captioned = config.condition == "text"
        return load_folder(
            config.path, config.image_size, labelled=labelled, captioned=captioned, crop=config.crop, num_classes=known
        )
    if config.name == "webdataset":
        return load_tars(config, known)
    return _in_memory(config)


def _in_memory(config: DataConfig) -> ArraySet:
    if config.name == "emoji":
        return emoji_set.load(config.image_size, config.skin_tones)
    if config.name == "digits":
        return digits_set.load(config.image_size)
    return fashion_set.load(config.path, config.image_size)
