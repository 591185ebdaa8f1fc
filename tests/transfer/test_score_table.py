"""Tables as people write them: exponents or values, markup, seeds, directions, and what is refused."""

from __future__ import annotations

import pytest

from megadit.errors import UserError
from megadit.transfer.plot import plot_verdict
from megadit.transfer.score_table import Columns, lower_is_better, verify_table

GOOD = Columns("width", "lr", "loss")
CURVE = (0.70, 0.62, 0.60, 0.61, 0.68)


def write(tmp_path, header="width,lr,loss", rows=None):
    path = tmp_path / "runs.csv"
    if rows is None:
        rows = [f"{w},2^{-10 + i},{y}" for w in (32, 64, 128) for i, y in enumerate(CURVE)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_best_is_in_the_columns_own_units(tmp_path):
    verdict = verify_table(write(tmp_path), GOOD, lower=True)
    assert verdict.verdict == "transfers" and verdict.best == 2.0**-8 and verdict.best_log2 == -8.0
    rows = [f"{w},{-10 + i},{y}" for w in (5, 6, 7) for i, y in enumerate(CURVE)]
    exponents = write(tmp_path, "log2_width,log2_lr,loss", rows)
    verdict = verify_table(exponents, Columns("log2_width", "log2_lr", "loss"), lower=True)
    assert verdict.best == verdict.best_log2 == -8.0
    assert [entry.scale for entry in verdict.scales] == [32.0, 64.0, 128.0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_with_a_mark_as_spreadsheets_write_it(tmp_path, encoding):
    path = write(tmp_path)
    path.write_bytes(path.read_text().encode(encoding))
    assert verify_table(path, GOOD, lower=True).best == 2.0**-8


def test_odd_values_are_given_back_as_they_were_written(tmp_path):
    rows = [f"{w},{lr},{y}" for w in (32, 64) for lr, y in zip((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), CURVE, strict=True)]
    assert verify_table(write(tmp_path, rows=rows), GOOD, lower=True).best == 1e-3


def test_markup_divergence_and_what_was_not_measured(tmp_path):
    rows = [f"{w},2^{-10 + i},{y}" for w in (32, 64) for i, y in enumerate((0.70, 0.62, "<u>0.60</u>", "**0.61**", ""))]
    rows += ["32,2^-6,NaN", "64,2^-6,diverged"]
    verdict = verify_table(write(tmp_path, rows=rows), GOOD, lower=True)
    assert verdict.verdict == "transfers"
    optimum = verdict.scales[0].optimum
    assert optimum is not None
    assert [point.stable for point in optimum.curve.points] == [True, True, True, True, False]
    assert optimum.curve.best.mean == 0.60


@pytest.mark.parametrize("named", [True, False], ids=["seed column", "equal rows"])
def test_seeds(tmp_path, named):
    rows = [
        f"{w},2^{-10 + i},{y + 0.001 * seed},{seed + 7}"
        for w in (32, 64)
        for i, y in enumerate(CURVE)
        for seed in range(2)
    ]
    path = write(tmp_path, "width,lr,loss,run", rows)
    verdict = verify_table(path, Columns("width", "lr", "loss", "run" if named else None), lower=True)
    assert verdict.evidence.noise.source == "seeds"
    optimum = verdict.scales[0].optimum
    assert optimum is not None
    assert list(optimum.curve.best.scores) == ([7, 8] if named else [0, 1])


@pytest.mark.parametrize(
    ("score", "lower"),
    [
        ("val_loss", True), ("fid50k", True), ("sfid50k", True), ("KID", True), ("inception_score", False),
        ("precision", False), ("GenEval", False), ("clip_score", False), ("IS", False), ("quality", None),
        ("this", None),
    ],
)  # fmt: skip
def test_directions_by_name(score, lower):
    assert lower_is_better(score) is lower


@pytest.mark.parametrize(
    ("columns", "rows", "complaint"),
    [
        (Columns("widht", "lr", "loss"), None, "--scale: .* has no column widht; did you mean width?"),
        (Columns("width", "rate", "loss"), None, "--hp: .* has no column rate; it has width, lr, loss"),
        (Columns("width", "lr", "loss", "seed"), None, "--seed: .* has no column seed"),
        (GOOD, [], "has no rows below its header"),
        (GOOD, ["32,2^-8,"], "has no row with a loss"),
        (GOOD, ["32,2^-8,good"], "loss in line 2 is 'good', not a number"),
        (GOOD, ["32,-8,0.6"], "only positive values have a log2; if the column holds exponents, call it log2_lr"),
        (GOOD, ["wide,2^-8,0.6"], "width in line 2 is 'wide', not a number"),
    ],
)
def test_refused(tmp_path, columns, rows, complaint):
    with pytest.raises(UserError, match=complaint):
        verify_table(write(tmp_path, rows=rows), columns, lower=True)


@pytest.mark.parametrize("row", ["1e308,-8,0.6", "5,1e308,0.6", "5,-2000,0.6"])
def test_exponents_beyond_floating_point_are_refused(tmp_path, row):
    path = write(tmp_path, "log2_width,log2_lr,loss", ["5,-8,0.7", row])
    with pytest.raises(UserError, match=r"in line 3 is .*, but 2 to that power is no number"):
        verify_table(path, Columns("log2_width", "log2_lr", "loss"), lower=True)


def test_no_file_and_no_table(tmp_path):
    with pytest.raises(UserError, match="no file .*absent.csv; name a CSV file"):
        verify_table(tmp_path / "absent.csv", GOOD, lower=True)
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="picture.csv is not a text file"):
        verify_table(tmp_path / "picture.csv", GOOD, lower=True)


def test_a_proxy_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--proxy: 48 is not among the values of width: 32, 64, 128"):
        verify_table(write(tmp_path), GOOD, lower=True, proxy=48)


def test_columns_of_any_name_are_plotted(tmp_path):
    path = write(tmp_path, header=r"$\frac$,lr,loss")
    verdict = verify_table(path, Columns(r"$\frac$", "lr", "loss"), lower=True)
    verdict.evidence.labels = {**verdict.evidence.labels, "table": "caf\udce9.csv"}
    plot_verdict(verdict, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
