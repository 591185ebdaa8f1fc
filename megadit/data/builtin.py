"""``build_datasets``: from the ``data`` section of a configuration to the training and validation sets."""

from __future__ import annotations

from megadit.config import DataConfig
from megadit.data import digits_set, emoji_set, fashion_set
from megadit.data.dataset import ArraySet, ImageSet
from megadit.data.folder import load_folder
from megadit.data.split import split


def build_datasets(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """(train, validation); the second may be empty. Without ``condition: class`` the sets have no classes.

    Raises ``UserError`` when files or packages are missing or damaged, or nothing would be left to train on.
    """
    labelled = config.condition == "class"
    if config.name == "image-folder":
        folder = load_folder(config.path, config.image_size, labelled=labelled)
        return split(folder, folder.bases, config.val_fraction, labelled=labelled, classes=config.classes)
    whole = _in_memory(config)
    return split(whole, whole.bases, config.val_fraction, labelled=labelled, classes=config.classes)


def _in_memory(config: DataConfig) -> ArraySet:
    if config.name == "emoji":
        return emoji_set.load(config.image_size, config.skin_tones)
    if config.name == "digits":
        return digits_set.load(config.image_size)
    return fashion_set.load(config.path, config.image_size)
