"""What ``config.reads`` says of a source's keys is what building it reads: noted while a set is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from megadit.config import DataConfig
from megadit.config.schema.reads import READ_WHERE
from megadit.data import build_datasets

OF_THE_SOURCE = ("path", "skin_tones", "crop")


class Noted:
    """A section whose keys are noted as they are read."""

    def __init__(self, section: DataConfig) -> None:
        self.section = section
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.section, name)


@pytest.mark.parametrize("name", ["digits", "emoji", "image-folder"])
def test_a_source_reads_the_keys_that_are_declared_and_no_other(tmp_path: Path, name: str) -> None:
    for number in range(3):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "cats" / f"{number}.png")
    path = str(tmp_path) if name == "image-folder" else None
    noted = Noted(DataConfig(name=name, path=path, image_size=8))
    build_datasets(cast(DataConfig, noted))
    declared = {key for key in OF_THE_SOURCE if READ_WHERE[f"data.{key}"][0].is_met(name)}
    assert noted.read & set(OF_THE_SOURCE) == declared
    assert {"classes", "val_fraction", "image_size"} <= noted.read
