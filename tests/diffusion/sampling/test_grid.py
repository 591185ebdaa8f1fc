"""Contact sheets: pixels where they belong, text where asked, files whole or absent."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.diffusion.sampling.grid import GAP, draw_grid, grid_columns, save_grid, save_npz, to_uint8
from megadit.errors import UserError


def pictures(count: int = 5, channels: int = 3, side: int = 32) -> torch.Tensor:
    values = torch.arange(count * channels * side * side) * 37 % 251
    return values.to(torch.uint8).reshape(count, channels, side, side)


def tile(sheet: Image.Image, number: int, columns: int, side: int, head: int = 0, foot: int = 0) -> np.ndarray:
    row, column = divmod(number, columns)
    top, left = GAP + head + row * (side + foot + GAP), GAP + column * (side + GAP)
    return np.asarray(sheet)[top : top + side, left : left + side]


def test_eight_bit_data_survives_scaling_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_is_found_in_its_place_enlarged(channels):
    images = pictures(channels=channels)
    sheet = draw_grid(images, columns=3)
    assert sheet.size == (GAP + 3 * (64 + GAP), GAP + 2 * (64 + GAP))
    for number in range(5):
        expected = images[number].expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(tile(sheet, number, 3, 64), expected)
    assert (tile(sheet, 5, 3, 64) == 255).all()


def test_large_pictures_keep_their_size():
    assert draw_grid(pictures(1, side=100), columns=1).size == (100 + 2 * GAP, 100 + 2 * GAP)


def test_titles_captions_and_footer_add_ink_and_leave_pictures_alone():
    images = pictures(4)
    plain = draw_grid(images, columns=2)
    written = draw_grid(
        images, columns=2, titles=["one", "two"], captions=["a", "b", "c", "d"], footer="drawn by someone"
    )
    assert written.height > plain.height
    assert written.width == plain.width
    for number in range(4):
        np.testing.assert_array_equal(tile(written, number, 2, 64, head=14, foot=14), tile(plain, number, 2, 64))
    strips = np.asarray(written)
    for name, strip in {"title": strips[:14], "caption": strips[86:98], "footer": strips[-14:]}.items():
        assert (strip < 128).any(), name


def test_long_text_stays_inside_its_tile():
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    sheet = np.asarray(draw_grid(images, columns=2, captions=["", "x" * 80 + " " + "word " * 30]))
    assert (sheet[:, : GAP + 64] == 255).all()
    assert (sheet[:, -GAP + 1 :] == 255).all()
    assert (sheet[:, GAP + 64 :] < 128).any()


def test_sheets_are_about_square():
    assert [grid_columns(count) for count in (1, 2, 4, 5, 16, 64)] == [1, 2, 2, 3, 4, 8]


def test_files_are_the_same_twice_and_leave_nothing_else(tmp_path):
    first = save_grid(pictures(), tmp_path / "new" / "a.png", captions=["x"] * 5).read_bytes()
    second = save_grid(pictures(), tmp_path / "new" / "b.png", captions=["x"] * 5).read_bytes()
    assert first == second
    assert sorted(os.listdir(tmp_path / "new")) == ["a.png", "b.png"]


def test_names_of_other_encodings_and_texts_of_any_length_are_drawn():
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    texts = ["caf\udce9 $\\frac$", "a " * 600_000, "x" * 2_000_000]  # the last two took minutes
    for text in texts:
        sheet = np.asarray(draw_grid(images, titles=[text], captions=[text], footer=text[:100], columns=1))
        assert (sheet[:14] < 128).any()


def test_npz_is_what_the_adm_evaluator_reads(tmp_path):
    path = save_npz(pictures(3, channels=1), tmp_path / "samples.npz")
    with np.load(path, allow_pickle=False) as archive:
        assert list(archive) == ["arr_0"]
        array = archive["arr_0"]
    assert array.shape == (3, 32, 32, 3) and array.dtype == np.uint8
    np.testing.assert_array_equal(array[..., 2], pictures(3, channels=1)[:, 0].numpy())


def test_an_impossible_place_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another place"):
        save_grid(pictures(), tmp_path / "file" / "a.png")


def test_captions_must_match_the_pictures():
    with pytest.raises(ValueError, match="captions: 2 for 5"):
        draw_grid(pictures(), captions=["a", "b"])
