"""``python -m megadit COMMAND`` and ``megadit COMMAND``: the same commands as the scripts, by name."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ranks import ROOT, run_command
from megadit.cli import main as commands
from megadit.parallel.environment import child_environment

SCRIPTS = {path.stem: path for part in ("launch", "tools") for path in (ROOT / part).glob("*.py")}


def as_module(monkeypatch: pytest.MonkeyPatch, *words: str, program: str = "/x/megadit/__main__.py") -> int:
    """The exit code of ``python -m megadit WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        commands.main()
    return int(end.value.code or 0)


def test_every_script_has_its_command_and_every_command_its_script():
    assert commands.names() == sorted(SCRIPTS)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_both_ways_lead_to_the_same_command(name, monkeypatch, capsys):
    assert as_module(monkeypatch, name, "--help") == 0
    usage, _, description = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: python -m megadit {name} ")
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    usage, _, by_script = capsys.readouterr().out.partition("\n\n")
    assert not end.value.code and usage.startswith(f"usage: {name}.py ")
    assert description == by_script and description


def test_an_installed_command_is_called_by_its_name(monkeypatch, capsys):
    assert as_module(monkeypatch, "doctor", "--help", program="/usr/bin/megadit") == 0
    assert capsys.readouterr().out.startswith("usage: megadit doctor ")


def test_the_list_has_a_line_for_each_command_and_fits_a_screen(monkeypatch, capsys):
    assert as_module(monkeypatch, "--help") == 0
    listing = capsys.readouterr().out
    assert [line.split()[0] for line in listing.splitlines() if line.startswith("  ")] == commands.names()
    assert max(map(len, listing.splitlines())) <= 100 and len(listing.splitlines()) <= 24
    assert as_module(monkeypatch) == 2  # nothing was done
    assert capsys.readouterr().out == listing


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("pretrian", "'pretrian' is not a command; did you mean pretrain?"), ("", "is empty"), ("main", "not a command")],
)
def test_another_word_is_refused(word, sentence, monkeypatch, capsys):
    assert as_module(monkeypatch, word) == 2
    assert re.fullmatch(rf"error: .*{re.escape(sentence)}.*\n", capsys.readouterr().err)


def test_a_reader_that_goes_away_is_no_error():
    shell = f"{sys.executable} -m megadit --help | true; exit ${{PIPESTATUS[0]}}"
    result = run_command(["bash", "-c", shell], timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode in (0, 1) and not result.stderr


def test_what_a_command_starts_finds_megadit_from_any_folder(tmp_path: Path):
    environment = child_environment({"RANK": "1", "PYTHONPATH": "/x"})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "kernels"), "/x"]
    assert "RANK" not in environment
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import megadit; print(megadit.__file__)"],  # as where it is not installed
        env=child_environment({}),
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert Path(result.stdout.strip()).parents[1] == ROOT


def test_the_entry_point_is_the_list_of_commands():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (module, function) = re.search(r'"megadit = ([\w.]+):(\w+)"', text).groups()  # type: ignore[union-attr]
    assert getattr(importlib.import_module(module), function) is commands.main
