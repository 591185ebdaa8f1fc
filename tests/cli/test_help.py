"""Every command and benchmark explains itself at once: --help exits with 0 and imports the standard library alone."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from helpers.help_texts import BENCHMARKS, ask_all, ask_help
from helpers.ranks import run_command


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    return ask_all()


def test_there_are_commands(answers):
    expected = {"launch/pretrain.py", "tools/doctor.py", "launch/sweep.py run", "tools/transfer.py apply"}
    assert expected | {"tools/encode.py fit-pca", "tools/evaluate.py emoji-clip"} <= set(answers)


def test_help_imports_nothing_but_the_standard_library(answers):
    assert {name: answer["foreign"] for name, answer in answers.items() if answer["foreign"]} == {}


@pytest.fixture(scope="module")
def benchmarks() -> dict[str, dict[str, Any]]:
    return ask_help({script: [] for script in BENCHMARKS})


def test_help_of_a_benchmark_imports_nothing_but_the_standard_library(benchmarks):
    assert len(benchmarks) >= 10
    assert {name: answer["foreign"] for name, answer in benchmarks.items() if answer["foreign"]} == {}


def test_help_is_complete(answers, benchmarks):
    for name, answer in (answers | benchmarks).items():
        assert answer["code"] == 0, name
        assert answer["text"].startswith("usage:") and "--help" in answer["text"], name
        described = [part for part in answer["text"].split("\n\n", 2)[1:2] if part.strip()]
        assert described, f"{name} --help says nothing about what the command is for"


def test_a_foreign_import_would_be_noticed(tmp_path):
    script = tmp_path / "heavy.py"
    script.write_text("import yaml, argparse\nargparse.ArgumentParser().parse_args()\n", encoding="utf-8")
    assert ask_help({str(script): []})[str(script)]["foreign"][-1] == "yaml"


@pytest.mark.parametrize("script", ["launch/pretrain.py", "tools/mup_table.py"])
def test_help_under_an_ascii_locale(script):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    result = run_command([sys.executable, script, "--help"], timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    assert (result.stdout.isascii() and "\\u2026" in result.stdout) or script != "launch/pretrain.py"
