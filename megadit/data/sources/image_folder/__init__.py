"""The ``image-folder`` source: your own images, one sub-folder per class or a ``metadata.jsonl``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadit.config.data_source import DataSource
from megadit.config.schema.data import DataConfig
from megadit.data.sources.image_folder.tree import image_root

if TYPE_CHECKING:
    from megadit.data.sources.image_folder.folder_set import FolderSet


def load(config: DataConfig, num_classes: int | None) -> FolderSet:
    """The images below ``data.path``. Raises UserError as ``load_folder`` does."""
    from megadit.data.sources.image_folder.folder_set import load_folder

    return load_folder(config, num_classes)


SOURCE = DataSource(load, image_root, reads=("path", "crop"))
