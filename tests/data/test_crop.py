"""Decoding, and the crops of ADM and of PixArt-alpha, against references in numpy."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.config import DataConfig
from megadit.config.schema.data import Crop
from megadit.data import build_datasets
from megadit.data.image_files import LONGEST, centre_crop, check_header, read_image
from megadit.data.shards.naming import Sharding
from megadit.data.shards.tar_set import cut_before_crop
from megadit.data.shards.writing import make_shards, recipe_of
from megadit.errors import UserError


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel, a = -1/2."""
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def resampled(
    array: np.ndarray, size: int, axis: int, kernel: Callable[[np.ndarray], np.ndarray] = cubic, reach: int = 2
) -> np.ndarray:
    """Antialiased resampling along one axis, from the kernel's definition; float64."""
    array = np.moveaxis(array.astype(np.float64), axis, 0)
    scale = array.shape[0] / size
    support = max(scale, 1.0)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * scale
        # Pillow's window: [round-down(centre - reach + 1/2), round-down(centre + reach + 1/2)), reach in support
        low = max(0, int(centre - reach * support + 0.5))
        high = min(array.shape[0], int(centre + reach * support + 0.5))
        weight = kernel(np.abs((np.arange(low, high) + 0.5 - centre) / support))
        rows.append(np.tensordot(weight / weight.sum(), array[low:high], axes=1))
    return np.moveaxis(np.stack(rows), 0, axis)


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop on arrays: means of pairs and bicubic, across and then down, 8 bits after each; cut."""
    array = np.asarray(image).astype(np.float64)
    while min(array.shape[:2]) >= 2 * size:
        array = np.floor((array[:, 0::2] + array[:, 1::2]) / 2 + 0.5)
        array = np.floor((array[0::2] + array[1::2]) / 2 + 0.5)
    scale = size / min(array.shape[:2])
    height, width = (round(side * scale) for side in array.shape[:2])
    array = np.clip(np.rint(resampled(array, width, 1)), 0, 255)
    array = np.clip(np.rint(resampled(array, height, 0)), 0, 255)
    top, left = (height - size) // 2, (width - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, 16), (80, 48, 16), (48, 88, 10), (40, 28, 20), (17, 31, 16), (6, 9, 12), (128, 64, 64)],
)
def test_centre_crop_is_adms(height: int, width: int, size: int) -> None:
    """Sides are even wherever the box filter halves, so that its means are those of pairs."""
    image = noise(height, width)
    cropped = centre_crop(image, size)
    assert cropped.size == (size, size)
    difference = np.abs(np.asarray(cropped).astype(int) - reference_crop(image, size).astype(int))
    assert difference.max() <= 1


def reference_center(image: Image.Image, size: int) -> np.ndarray:
    """``T.Resize(size), T.CenterCrop(size)`` on arrays: bilinear to the shorter side, the longer rounded down; cut."""
    array = np.asarray(image).astype(np.float64)
    short = min(array.shape[:2])
    height, width = (int(size * side / short) for side in array.shape[:2])
    array = np.clip(np.rint(resampled(array, width, 1, triangle, 1)), 0, 255)
    array = np.clip(np.rint(resampled(array, height, 0, triangle, 1)), 0, 255)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"), [(64, 64, 16), (81, 47, 16), (48, 91, 10), (40, 29, 20), (17, 31, 16), (6, 9, 12)]
)
def test_center_is_pixarts(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    cropped = np.asarray(centre_crop(image, size, "center")).astype(int)
    assert cropped.shape == (size, size, 3)
    assert np.abs(cropped - reference_center(image, size).astype(int)).max() <= 1
    assert np.abs(cropped - np.asarray(centre_crop(image, size)).astype(int)).max() > 20  # ADM's is another picture


@pytest.mark.parametrize(("width", "left"), [(9, 0), (11, 2), (13, 2), (15, 4)])
def test_center_halves_an_odd_margin_as_torchvision_does(width: int, left: int) -> None:
    """Of 1, 3, 5 and 7 spare columns the half rounds to even."""
    columns = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (8, width, 3))
    assert np.asarray(centre_crop(Image.fromarray(columns.copy()), 8, "center"))[0, 0, 0] == left


@pytest.mark.parametrize("crop", ["adm", "center"])
def test_a_crop_takes_the_centre(crop: Crop) -> None:
    strip = np.zeros((8, 24, 3), np.uint8)
    strip[:, 8:16] = 200
    assert np.unique(np.asarray(centre_crop(Image.fromarray(strip), 8, crop))).tolist() == [200]


@pytest.mark.parametrize("crop", ["adm", "center"])
@pytest.mark.parametrize(("width", "height"), [(LONGEST, 1), (1, LONGEST), (40 * LONGEST, 40), (15, 15 * LONGEST)])
def test_no_picture_is_scaled_to_more_than_its_length_in_squares(
    crop: Crop, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its sides, as long as it is not too long to be taken: with them the memory is bounded."""
    sizes: list[int] = []
    resize = Image.Image.resize

    def counted(image: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        sizes.append(size[0] * size[1])
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert centre_crop(noise(height, width), 16, crop).size == (16, 16)
    assert sizes and max(sizes) <= max(LONGEST * 16 * 16, width * height // 4)  # halved once, and scaled


def test_folders_and_tars_are_cut_as_data_crop_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    noise(64, 96).save(tmp_path / "a" / "0.png")
    noise(64, 96).save(tmp_path / "a" / "1.png")
    crops: dict[Crop, np.ndarray] = {
        crop: np.asarray(centre_crop(noise(64, 96), 16, crop)).transpose(2, 0, 1) for crop in ("adm", "center")
    }
    common = {"image_size": 16, "val_fraction": 0.0, "condition": "none"}
    folder = DataConfig(name="image-folder", path=str(tmp_path / "a"), **common)
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:  # other people's tars hold images as they are
        tar.add(tmp_path / "a" / "0.png", "0.png")
    tars = DataConfig(name="webdataset", path=str(tmp_path / "x-0.tar"), **common)
    for crop, expected in crops.items():
        for config in (folder, tars):
            dataset = build_datasets(config.model_copy(update={"crop": crop}))[0]
            np.testing.assert_array_equal(dataset.image(0).numpy(), expected)
    assert folder.crop == "adm"


def test_tars_remember_how_their_images_were_cut(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(3):
        noise(24, 40 + number).save(tmp_path / "a" / f"{number}.png")
    common = {"image_size": 8, "condition": "none", "val_fraction": 0.0}
    for crop in ("adm", "center"):
        images = DataConfig(name="image-folder", path=str(tmp_path / "a"), crop=crop, **common)
        make_shards(images, tmp_path / crop, Sharding("x", 10))
    cut = DataConfig(name="webdataset", path=str(tmp_path / "center"), crop="center", **common)
    assert torch.equal(build_datasets(cut)[0].image(0), build_datasets(images)[0].image(0))
    with pytest.raises(UserError, match=r"^data\.crop: adm, but .* were cut by center when it was written; set"):
        build_datasets(cut.model_copy(update={"crop": "adm"}))
    with pytest.raises(UserError, match=r"^data\.crop: center, but .* were cut by adm .*; set data\.crop=adm, or"):
        build_datasets(cut.model_copy(update={"path": str(tmp_path / "adm")}))
    # Built-in sets are not cut, and what has another size is cut again, and how is free.
    make_shards(DataConfig(name="digits"), tmp_path / "digits", Sharding("x", 2000))
    assert (
        build_datasets(cut.model_copy(update={"path": str(tmp_path / "digits"), "image_size": None}))[0].channels == 1
    )
    assert build_datasets(cut.model_copy(update={"crop": "adm", "image_size": 4}))[0].image(0).shape == (3, 4, 4)


def test_tars_of_before_the_key_are_used_and_gone_on_with(tmp_path: Path) -> None:
    """Their manifests and recipes hold no ``crop``; they were cut by the default one, which a note tells."""
    (tmp_path / "a").mkdir()
    noise(24, 40).save(tmp_path / "a" / "0.png")
    common = {"image_size": 8, "condition": "none", "val_fraction": 0.0}
    make_shards(DataConfig(name="image-folder", path=str(tmp_path / "a"), **common), tmp_path / "x", Sharding("x", 10))
    tars = DataConfig(name="webdataset", path=str(tmp_path / "x"), crop="center", **common)
    assert cut_before_crop(tars) is None  # a manifest that tells its crop is refused or right
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["made"]["data"].pop("crop") == "adm"
    (tmp_path / "x" / "manifest.json").write_text(json.dumps(manifest))
    assert len(build_datasets(tars)[0]) == 1
    assert "were cut by adm, before there was data.crop: center has no effect" in (cut_before_crop(tars) or "")
    assert cut_before_crop(tars.model_copy(update={"crop": "adm"})) is None
    for crop, written_crop in (("adm", {}), ("center", {"crop": "center"})):
        recipe = recipe_of({"data": DataConfig(crop=crop).model_dump(mode="json")})["data"]
        assert {key: recipe[key] for key in recipe if key == "crop"} == written_crop


def test_an_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    image = noise(16, 16)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 16).numpy(), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    noise(8, 8).convert("RGB").convert(mode).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}", 8).shape == (3, 8, 8)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", 4).numpy()
    assert pixels[:, 0, 0].tolist() == [10, 20, 30] and pixels[:, 3, 3].tolist() == [255, 255, 255]


def broken_files(folder: Path) -> dict[str, Path]:
    noise(32, 32).save(folder / "good.png")
    noise(32, 32).save(folder / "good.jpg")
    png, jpg = (folder / "good.png").read_bytes(), (folder / "good.jpg").read_bytes()
    contents = {
        "empty.png": b"",
        "text.png": b"not an image at all",
        "cut.png": png[: len(png) // 2],
        "cut.jpg": jpg[: len(jpg) // 2],
        "head.png": png[:20],
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 27\n",
        "flipped.png": png[:200] + bytes(byte ^ 0xFF for byte in png[200:260]) + png[260:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(folder / "deep.png")
    return {name: folder / name for name in (*contents, "deep.png", "missing.png")}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty.png", "is an empty file"),
        ("text.png", r"cannot decode the image .*text\.png \(its format is not known\): it is a text file; look "),
        ("pointer.png", r"it is a git-LFS pointer; run `git lfs pull`"),
        ("cut.png", "cannot decode the image .* it is cut off: the mark of a picture's end is missing"),
        ("cut.jpg", r"cannot decode the image .*cut\.jpg \(.*[Tt]runcated"),
        ("head.png", "cannot decode the image"),
        ("flipped.png", "cannot decode the image"),
        ("deep.png", "8 bits per channel are needed"),
        ("missing.png", "cannot read .*No such file"),
    ],
)
def test_bad_files_are_named_with_a_remedy(tmp_path: Path, name: str, sentence: str) -> None:
    path = broken_files(tmp_path)[name]
    with pytest.raises(UserError, match=rf"data\.path: .*{sentence}") as caught:
        read_image(path, 8)
    assert str(path) in str(caught.value) and str(caught.value).endswith("replace the file or take it out of the set")


@pytest.mark.parametrize("name", ["empty.png", "text.png", "cut.png", "head.png", "flipped.png", "missing.png"])
def test_the_header_check_finds_what_needs_no_decoding(tmp_path: Path, name: str) -> None:
    path = broken_files(tmp_path)[name]
    check_header(tmp_path / "good.png")
    check_header(tmp_path / "good.jpg")
    with pytest.raises(UserError, match=name):
        check_header(path)
