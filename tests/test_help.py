"""Every command explains itself at once: --help exits with 0 and loads nothing heavy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.ranks import run_command

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(str(path.relative_to(ROOT)) for part in ("launch", "tools") for path in (ROOT / part).glob("*.py"))
HEAVY = ("torch", "deepspeed", "numpy", "diffusers", "transformers", "matplotlib", "sklearn", "scipy", "optuna")

# Runs the script as __main__ in this interpreter and tells, on a line of its own, what it imported.
PROGRAM = """
import json, runpy, sys
script, heavy = sys.argv[1], json.loads(sys.argv[2])
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
    code = "it did not exit"
except SystemExit as end:
    code = end.code or 0
print("\\n" + json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def ask_help(script: str) -> tuple[object, list[str], str]:
    """(exit code, heavy modules loaded, what was printed) of ``script --help``."""
    result = run_command([sys.executable, "-c", PROGRAM, script, json.dumps(HEAVY)], timeout=60)
    assert result.returncode == 0, result.stderr
    *text, last = result.stdout.strip().splitlines()
    code, heavy = json.loads(last)
    return code, heavy, "\n".join(text)


def test_there_are_commands():
    assert {"launch/pretrain.py", "tools/doctor.py"} <= set(COMMANDS)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_quick_and_complete(script):
    code, heavy, text = ask_help(script)
    assert code == 0
    assert not heavy, f"{script} imports {heavy} before it has parsed its arguments"
    assert text.startswith("usage:") and "--help" in text
    described = [line for line in text.split("\n\n", 2)[1:2] if line.strip()]
    assert described, f"{script} --help says nothing about what the command is for"


def test_a_heavy_import_would_be_noticed(tmp_path):
    script = tmp_path / "heavy.py"
    script.write_text("import numpy, argparse\nargparse.ArgumentParser().parse_args()\n")
    assert ask_help(str(script))[1] == ["numpy"]
