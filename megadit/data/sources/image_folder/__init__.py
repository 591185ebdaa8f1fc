"""The ``image-folder`` source: your own images, one sub-folder per class or a ``metadata.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megadit.config.data_source import DataSource
from megadit.config.schema.data import DataConfig
from megadit.errors import UserError

if TYPE_CHECKING:
    from megadit.data.sources.image_folder.folder_set import FolderSet


def image_root(config: DataConfig) -> Path:
    """The folder ``data.path``. Raises UserError if it is not given or no folder."""
    if config.path is None:
        raise UserError("data.path: not given; image-folder needs the folder that holds the images")
    root = Path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path: {config.path} is not a folder; give the folder that holds the images")
    return root


def load(config: DataConfig, num_classes: int | None = None) -> FolderSet:
    """The images below ``data.path``. Raises UserError as ``image_root`` and ``load_folder`` do."""
    from megadit.data.sources.image_folder.folder_set import load_folder

    return load_folder(config, image_root(config), num_classes)


SOURCE = DataSource(load, image_root, reads=("path", "crop"))
