"""Folders of images for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from megadit.config import DataConfig


def picture(path: Path, value: int = 0) -> None:
    """Write a grey picture of 8 x 6 pixels, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(path)


def config(path: Path, **more: object) -> DataConfig:
    """The data section of an image folder, at 4 pixels."""
    return DataConfig.model_validate({"name": "image-folder", "path": str(path), "image_size": 4, **more})


def metadata(folder: Path, *lines: object) -> None:
    """Write ``metadata.jsonl``: texts as they are, other values as JSON."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
