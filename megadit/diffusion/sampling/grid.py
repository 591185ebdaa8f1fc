"""Grids of images as one PNG, with titles above columns, captions below tiles and a footer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from megadit.errors import UserError
from megadit.files.paths import atomic_write
from megadit.files.text import replace_surrogates

if TYPE_CHECKING:
    from PIL import Image

GAP = 4  # pixels between tiles
SMALLEST_TILE = 64  # pixels; smaller images are enlarged by an integer factor
FONT_SIZE, LINE = 11, 14
_NARROWEST = 2  # pixels of a letter
INK, PAPER = (60, 60, 60), (255, 255, 255)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, on the CPU: floor(127.5 x + 128) clamped, as the DiT code writes its samples.

    Exact on 8-bit data that was scaled by u / 127.5 - 1.
    """
    return (images.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8).cpu()


def grid_columns(count: int) -> int:
    """Number of columns of a grid of ``count`` tiles that is closest to a square."""
    return math.ceil(math.sqrt(count))


def save_grid(
    images: Tensor,
    path: Path,
    *,
    columns: int | None = None,
    titles: Sequence[str] = (),
    captions: Sequence[str] = (),
    footer: str = "",
) -> Path:
    """Write a grid of images atomically, and return its path.

    images: uint8 (N, 1 or 3, H, W).  columns: default ``grid_columns``.  titles: one per column.  captions: one per
    image.  footer: text below, such as an attribution. Raises UserError where ``path`` cannot be written.
    """
    sheet = draw_grid(images, columns=columns, titles=titles, captions=captions, footer=footer)
    return _write_whole(path, lambda file: sheet.save(file, format="PNG"))


def save_npz(pictures: Tensor, path: Path) -> Path:
    """Write images, uint8 (N, C, H, W), as ``arr_0`` (N, H, W, 3), the format of the ADM evaluator.

    Grey images are repeated over three channels. Raises UserError where ``path`` cannot be written.
    """
    import numpy as np

    array = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
    return _write_whole(path, lambda file: np.savez(file, arr_0=array.permute(0, 2, 3, 1).contiguous().numpy()))


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Write a file atomically, by ``write``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    return path


def draw_grid(
    images: Tensor,
    *,
    columns: int | None = None,
    titles: Sequence[str] = (),
    captions: Sequence[str] = (),
    footer: str = "",
) -> Image.Image:
    """The grid of ``save_grid`` as a PIL image."""
    from PIL import Image, ImageDraw

    count, _, height, width = images.shape
    if captions and len(captions) != count:
        raise ValueError(f"captions: {len(captions)} for {count} pictures")
    factor = max(1, math.ceil(SMALLEST_TILE / max(height, width)))
    text = _Text.of(width * factor)
    heads, feet = [text.wrap(title) for title in titles], [text.wrap(caption) for caption in captions]
    columns = columns or grid_columns(count)
    plan = _Plan(
        columns=columns,
        rows=math.ceil(count / columns),
        tile=(width * factor, height * factor),
        head=LINE * max(map(len, heads), default=0),
        foot=LINE * max(map(len, feet), default=0),
    )
    note = text.wrap(footer, width=plan.width - 2 * GAP, lines=6) if footer else []
    sheet = Image.new("RGB", (plan.width, plan.height + LINE * len(note)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads[:columns]):
        text.write(pen, plan.corner(column)[0], GAP, lines)
    for number, pixels in enumerate(images):
        left, top = plan.corner(number)
        sheet.paste(_picture(pixels).resize(plan.tile, Image.Resampling.NEAREST), (left, top))
        if feet:
            text.write(pen, left, top + plan.tile[1], feet[number])
    text.write(pen, GAP, plan.height, note)
    return sheet


@dataclass(frozen=True)
class _Plan:
    """Positions of tiles and texts, in pixels."""

    columns: int
    rows: int
    tile: tuple[int, int]
    head: int
    foot: int

    @property
    def width(self) -> int:
        return GAP + self.columns * (self.tile[0] + GAP)

    @property
    def height(self) -> int:
        return GAP + self.head + self.rows * (self.tile[1] + self.foot + GAP)

    def corner(self, number: int) -> tuple[int, int]:
        """Left and top of the tile ``number``, counted along the rows."""
        row, column = divmod(number, self.columns)
        return GAP + column * (self.tile[0] + GAP), GAP + self.head + row * (self.tile[1] + self.foot + GAP)


@dataclass(frozen=True)
class _Text:
    """Wraps and draws text of one font at a width in pixels."""

    font: Any
    width: int

    @staticmethod
    def of(width: int) -> _Text:
        from PIL import ImageFont

        return _Text(ImageFont.load_default(size=FONT_SIZE), width)

    def wrap(self, text: str, *, width: int | None = None, lines: int = 2) -> list[str]:
        """The text in at most ``lines`` lines, cut with dots where it does not fit."""
        limit = width or self.width
        most = lines * int(limit) // _NARROWEST + 1  # cut early: each line measures all of the remaining text
        remaining = " ".join(replace_surrogates(text[: 8 * most]).split())[:most]
        result: list[str] = []
        while remaining and len(result) < lines:
            length = self._longest(remaining, limit)
            if len(result) == lines - 1 and length < len(remaining):
                while length > 1 and self._length(remaining[:length] + "...") > limit:
                    length -= 1
                result.append(remaining[:length].rstrip() + "...")
                break
            result.append(remaining[:length].rstrip())
            remaining = remaining[length:].lstrip()
        return result

    def write(self, pen: Any, left: int, top: int, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines):
            pen.text((left, top + number * LINE), line, fill=INK, font=self.font)

    def _longest(self, text: str, limit: int) -> int:
        """Number of characters that fit on a line: whole words, or a part of the first one."""
        if self._length(text) <= limit:
            return len(text)
        ends = [index for index, letter in enumerate(text) if letter == " " and self._length(text[:index]) <= limit]
        if ends:
            return ends[-1]
        return max((n for n in range(1, len(text)) if self._length(text[:n]) <= limit), default=1)

    def _length(self, text: str) -> float:
        return float(self.font.getlength(text))


def _picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) -> an RGB image of the first three channels, or of the first one as grey."""
    from PIL import Image

    shown = pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().numpy())
