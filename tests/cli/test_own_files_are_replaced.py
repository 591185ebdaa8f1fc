"""A report written again takes the place of the former one; what is no report stays (see tests/bad_input)."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.bad_input import script
from megadit.files.paths import PNG, check_output
from megadit.mup.coord_check.plan import check_report_folder
from megadit.mup.coord_check.record import CoordMeasurement
from megadit.mup.coord_check.report import write_report
from megadit.mup.coord_check.verdict import judge

DIGITS = "quickstart/digits.yaml"


def test_base_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, out = script("tools/base_shapes.py").main, tmp_path / "x.bsh"
    assert main(["--config", DIGITS, "--out", str(out)]) == 0
    first = out.read_bytes()
    assert main(["--config", DIGITS, "model.depth=2", "--out", str(out)]) == 0
    assert len(out.read_bytes()) < len(first)


def test_the_report_of_a_coordinate_check(tmp_path: Path) -> None:
    measurements = [
        CoordMeasurement(width, seed, step, "head", "output", quantity, 1.0)
        for width in (32, 64, 128)
        for seed in (0, 1)
        for step in (1, 2, 3, 4, 5)
        for quantity in ("output", "update", "weight")
    ]
    write_report(tmp_path, measurements, judge(measurements), "a check")
    check_report_folder(tmp_path)
    check_output(tmp_path / "coord_check.png", "--out", "picture", PNG)
