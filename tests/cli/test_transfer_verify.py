"""``tools/transfer.py verify``: what it prints, its JSON, its exit codes, its picture, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.ranks import run_command
from helpers.studies.fabricated import fabricate, make_study, valley
from megadit.cli import transfer
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "tests" / "data" / "paper"
TABLE7 = ["--table", str(PAPER / "table07_width_lr.csv"), "--scale", "width", "--hp", "log2_lr"]


@pytest.fixture(scope="module")
def main():
    return transfer.main


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory):
    """Studies by name: fine transfers, moving does not, open is inconclusive, half is not complete."""
    study = make_study(tmp_path_factory.mktemp("studies"))
    return {
        "fine": fabricate(study, valley()),
        "moving": fabricate(study, valley(drift=-1.0)),
        "open": fabricate(study, valley(best=-4.0)),
        "half": fabricate(study, valley(), keep=lambda trial: trial.number % 2 == 0),
    }


@pytest.fixture
def studies(fabricated, monkeypatch):
    """The studies of ``fabricated`` as if they lay on disk."""
    monkeypatch.setattr("megadit.search.storage.store.load_results", fabricated.__getitem__)


def test_the_command_as_people_run_it(tmp_path):
    """One whole command: the paper's table 7, JSON on stdout alone, a picture, exit code 0."""
    picture = tmp_path / "verdict.png"
    words = [sys.executable, "tools/transfer.py", "verify", *TABLE7, "--score", "fid50k", "--lower-is-better", "--json"]
    result = run_command([*words, "--plot", str(picture)], timeout=60)
    assert result.returncode == 0, result.stderr
    plain = json.loads(result.stdout)
    assert result.stderr.splitlines()[-1] == f"picture: {picture}"
    assert plain["verdict"] == "transfers" and plain["best"] == -10.0
    assert plain["regret"] == 0.0 and abs(plain["drift"]) < 0.25
    assert [entry["scale"] for entry in plain["per_scale"]] == [144, 288, 576]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "code"), [("fine", 0), ("moving", 3), ("open", 1)])
def test_exit_codes(main, studies, capsys, name, code):
    assert main(["verify", name]) == code
    out = capsys.readouterr().out
    answer = {0: "transfers, best 2^-7", 3: "does not transfer", 1: "inconclusive"}[code]
    assert f"verdict: {answer}\n" in out
    assert out.startswith("widths: ") and "drift" in out and "at proxy's best" in out


def test_of_several_studies_the_worst_counts(main, studies, capsys):
    assert main(["verify", "fine", "moving", "--json"]) == 3
    plain = json.loads(capsys.readouterr().out)
    assert plain["verdict"] == "does not transfer" and len(plain["studies"]) == 2
    assert main(["verify", "fine", "open"]) == 1
    assert "all together: inconclusive" in capsys.readouterr().out


def test_an_unknown_score_is_taken_as_higher_is_better_with_a_warning(main, tmp_path, capsys):
    table = tmp_path / "t.csv"
    curve = (1, 4, 5, 4.2, 2)
    rows = [f"{w},{-10 + i},{y}" for w in (5, 6, 7) for i, y in enumerate(curve)]
    table.write_text("\n".join(["log2_width,log2_lr,quality", *rows]))
    words = ["verify", "--table", str(table), "--scale", "log2_width", "--hp", "log2_lr", "--score", "quality"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "warning: taking a higher quality as better" in captured.err and "best 2^-8" in captured.out
    assert main([*words, "--higher-is-better"]) == 0
    assert capsys.readouterr().err == ""


def test_tolerances_are_options(main, studies, capsys):
    assert main(["verify", "moving", "--max-drift", "2", "--max-regret", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"]["max_drift"] == 2.0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing to judge"),
        (["half"], "is incomplete"),
        (TABLE7, "--score: is missing"),
        ([*TABLE7, "--score", "fid"], "has no column fid; did you mean fid50k?"),
        ([*TABLE7, "--score", "fid50k", "fine"], "--table: is given beside the study fine"),
        ([*TABLE7, "--score", "fid50k", "--variant", "sp"], "--variant: a table has none"),
        (["fine", "--lower-is-better"], "--lower-is-better: is for --table"),
        (["fine", "--max-drift", "-1"], "--max-drift: -1 is not a number of 0 or more"),
        (["fine", "--max-regret", "nan"], "--max-regret: nan"),
        (["fine", "open", "--plot", "x.png"], "--plot: 2 studies do not fit one picture"),
        (["fine", "--plot", "/nowhere/x.png"], "--plot /nowhere/x.png: cannot be written"),
    ],
)
def test_bad_input(main, studies, words, complaint):
    with pytest.raises(UserError, match=complaint):
        main(["verify", *words])


def test_the_picture_holds_its_special_cases(tmp_path, main):
    """An exception, an open end, a flat basin, a scale at which all diverged."""
    for name, scale, hp in (
        ("table09_steps_lr", "steps", "log2_lr"),
        ("table10_width_output_mult", "width", "log2_output_mult"),
    ):
        words = ["--table", str(PAPER / f"{name}.csv"), "--scale", scale, "--hp", hp, "--score", "fid50k"]
        assert main(["verify", *words, "--plot", str(tmp_path / f"{name}.png")]) == 0
    table = tmp_path / "gone.csv"
    rows = [f"{w},{-10 + i},{'nan' if w == 64 else y}" for w in (32, 64) for i, y in enumerate((0.7, 0.6, 0.62))]
    table.write_text("\n".join(["width,log2_lr,loss", *rows]))
    words = ["--table", str(table), "--scale", "width", "--hp", "log2_lr", "--score", "loss"]
    assert main(["verify", *words, "--plot", str(tmp_path / "gone.png")]) == 3
    assert len(list(tmp_path.glob("*.png"))) == 3
