"""What every command prints for --help, asked of all in one interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from helpers.ranks import run_command

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(str(path.relative_to(ROOT)) for part in ("launch", "tools") for path in (ROOT / part).glob("*.py"))
BENCHMARKS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
# Asked beside those that argparse knows of as sub-commands.
ALSO = {"tools/encode.py": ["fit-pca"]}

# Runs each script as __main__ with --help, then each of its sub-commands, all in one interpreter, and tells what each
# imported besides the standard library and this project. What was imported is forgotten before the next.
PROGRAM = """
import argparse, contextlib, io, json, runpy, sys

def foreign():
    return {name for name in sys.modules if name.partition(".")[0] not in known}

def ask(script, *words):
    sys.argv = [script, *words, "--help"]
    before = set(sys.modules)
    printed = sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    try:
        runpy.run_path(script, run_name="__main__")
        code = "it did not exit"
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        code = repr(error)
    finally:
        sys.stdout = sys.__stdout__
    printed.flush()
    found = {"code": code, "foreign": sorted({name.partition(".")[0] for name in foreign()}),
             "text": printed.buffer.getvalue().decode()}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] not in sys.stdlib_module_names:
            del sys.modules[name]
    return found

known = {"benchmarks", "megadit", "megadit_kernels", *sys.stdlib_module_names}
known |= {name.partition(".")[0] for name in sys.modules}
add_parser, names = argparse._SubParsersAction.add_parser, []
argparse._SubParsersAction.add_parser = lambda self, name, **rest: names.append(name) or add_parser(self, name, **rest)
answers = {}
for script, also in json.loads(sys.argv[1]).items():
    names.clear()
    answers[script] = ask(script)
    for name in [*names, *also]:
        answers[f"{script} {name}"] = ask(script, name)
print(json.dumps(answers))
"""


def ask_help(scripts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """By command: exit code, foreign modules that were imported, and what was printed."""
    result = run_command([sys.executable, "-c", PROGRAM, json.dumps(scripts)], {"COLUMNS": "100"}, timeout=100)
    assert result.returncode == 0, result.stderr
    answers: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return answers


def ask_all() -> dict[str, dict[str, Any]]:
    """``ask_help`` of every command and sub-command."""
    return ask_help({script: ALSO.get(script, []) for script in COMMANDS})
