"""The grid in TensorBoard: any sheet that a run draws, and a warning where it cannot be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from megadit.train.callbacks.logging import TensorBoard


@pytest.fixture
def board(tmp_path: Path) -> tuple[TensorBoard, Any, list[tuple[int, ...]]]:
    """The callback at step 4 of a run that has just drawn a sheet, and the shapes of what it was given."""
    shapes: list[tuple[int, ...]] = []
    callback = TensorBoard()
    callback._writer = SimpleNamespace(add_image=lambda tag, picture, step, dataformats: shapes.append(picture.shape))
    run = SimpleNamespace(
        position=SimpleNamespace(step=4),
        config=SimpleNamespace(train=SimpleNamespace(sample_every=4)),
        total_steps=8,
        directory=SimpleNamespace(grid=lambda step: tmp_path / "sheet.png"),
    )
    return callback, run, shapes


def test_a_sheet_of_one_long_row_is_shown(board: Any, tmp_path: Path) -> None:
    callback, run, shapes = board
    Image.new("RGB", (400, 10)).save(tmp_path / "sheet.png")
    callback.after_log(run)
    assert shapes == [(10, 400, 3)]


def test_one_that_cannot_be_read_is_a_warning(board: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, run, shapes = board
    (tmp_path / "sheet.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    callback.after_log(run)
    assert shapes == [] and capsys.readouterr().err.startswith("warning: train.tensorboard: cannot decode the image")
