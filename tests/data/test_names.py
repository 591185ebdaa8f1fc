"""Names of files that are not UTF-8 go by their bytes through everything that a run and its tars write and read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from helpers.training import small_config
from megadit.config import DataConfig
from megadit.data import build_datasets, check_images
from megadit.data.build import held_out
from megadit.data.dataset import Subset
from megadit.data.identity import differences, identify
from megadit.data.listing import MISSING
from megadit.data.shards.naming import INDEX, MANIFEST, Sharding
from megadit.data.shards.tar_set import load_tars
from megadit.data.shards.writing import make_shards
from megadit.errors import UserError

LATIN = b"caf\xe9"  # in Latin-1; no UTF-8


def section(path: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate(
        {"name": "image-folder", "path": str(path), "image_size": 8, "val_fraction": 0.3, **more}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A class folder and files whose names are not UTF-8, beside others."""
    for parent in (b"dog", LATIN):
        os.makedirs(os.fsencode(tmp_path) + b"/set/" + parent)
        for number in range(12):
            path = os.fsencode(tmp_path) + b"/set/%b/%b%d.png" % (parent, LATIN, number)
            with open(path, "wb") as file:
                Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return tmp_path / "set"


def test_they_are_listed_split_and_known_by_their_bytes(folder: Path) -> None:
    train, held = build_datasets(section(folder))
    assert train.classes == ("caf\udce9", "dog") and len(train) + len(held) == 24 and len(held)
    assert b"dog/caf\xe97.png" in train.listing().names and MISSING not in train.listing().sizes
    assert train.caption(0) == "caf\ufffd"  # what a tokenizer takes
    assert check_images(train).decoded
    assert held_out("image-folder", "caf\udce9", 0.3) == held_out("image-folder", os.fsdecode(LATIN), 0.3)


def test_a_run_that_goes_on_knows_them_again_and_names_what_changed(folder: Path, tmp_path: Path) -> None:
    data = section(folder).model_dump()
    config = small_config(model={"in_channels": 3, "num_classes": 2}, data=data)
    sets = build_datasets(config.data)
    before = json.loads(json.dumps(identify(config, *sets)))
    assert not differences(before, identify(config, *sets), sets[0])
    os.rename(os.fsencode(folder) + b"/" + LATIN, os.fsencode(folder) + b"/caf\xea")
    sets = build_datasets(config.data)
    changes = "\n".join(differences(before, identify(config, *sets), sets[0]))
    assert "class 0 was 'caf\udce9' and is 'caf\udcea'" in changes


@pytest.mark.parametrize("manifest", [True, False])
def test_tars_of_them_are_the_set(
    folder: Path, tmp_path: Path, manifest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_shards(section(folder), tmp_path / "tars", Sharding("x", 10))
    values = json.loads((tmp_path / "tars" / MANIFEST).read_bytes())
    assert values["classes"] == ["caf\udce9", "dog"]
    if not manifest:
        (tmp_path / "tars" / MANIFEST).unlink()
        (tmp_path / "tars" / INDEX).unlink()
    tars = load_tars(DataConfig(name="webdataset", path=str(tmp_path / "tars"), image_size=8))
    train, _ = build_datasets(section(folder))
    assert isinstance(train, Subset)
    images = train.source
    assert tars.bases == images.bases  # type: ignore[attr-defined]
    assert [tars.caption(i) for i in range(24)] == [images.caption(i) for i in range(24)]
    assert tars.classes == (images.classes if manifest else ("0", "1"))


def test_a_damaged_file_is_named(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/dog/caf\xe90.png", "wb") as file:
        file.write(b"x")
    train, _ = build_datasets(section(folder, val_fraction=0.0))
    with pytest.raises(UserError, match=r"dog/caf\\udce90\.png"):
        check_images(train)


def test_metadata_names_them_by_pythons_escape(folder: Path) -> None:
    name = f"dog/{os.fsdecode(LATIN)}3.png"
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "label": 0}))
    train, _ = build_datasets(section(folder, val_fraction=0.0))
    assert check_images(train).opened == 1 and int(train.image(0)[0, 0, 0]) == 3
