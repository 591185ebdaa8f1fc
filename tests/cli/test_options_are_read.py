"""Every option of every command is read by it: none is accepted and then ignored, but for those that say so."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Files that add arguments to a parser; what several commands have in common stands in the first of them.
FILES = ["megadit/cli/__init__.py", *sorted(f"megadit/cli/{p.name}" for p in (ROOT / "megadit/cli").glob("[!_]*.py"))]
FILES += sorted(f"megadit/evaluate/metrics/{path.name}" for path in (ROOT / "megadit/evaluate/metrics").glob("*.py"))


def additions(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield node


def destination(call: ast.Call) -> str | None:
    """The attribute of the parsed arguments that ``add_argument`` sets, as argparse itself finds it.

    None for options of a table, whose names the call does not spell out.
    """
    names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    if not names:
        return None
    given = {k.arg: k.value.value for k in call.keywords if k.arg == "dest" and isinstance(k.value, ast.Constant)}
    return argparse.ArgumentParser().add_argument(*names, **given).dest


def without_effect(call: ast.Call) -> bool:
    """Taken out of habit, from launchers or for uniformity: hidden, or the help says that it has no effect."""
    helps = [keyword.value for keyword in call.keywords if keyword.arg == "help"]
    return any(
        ast.unparse(text) == "argparse.SUPPRESS"
        or (isinstance(text, ast.Constant) and str(text.value).startswith("no effect"))
        for text in helps
    )


def unread(text: str) -> list[str]:
    """Destinations that nothing in the file reads as ``args.NAME``, or names in a string for ``getattr``."""
    tree = ast.parse(text)
    in_additions = {id(node) for call in additions(tree) for node in ast.walk(call)}
    read = {
        node.attr if isinstance(node, ast.Attribute) else node.value
        for node in ast.walk(tree)
        if id(node) not in in_additions
        and (isinstance(node, ast.Attribute) or (isinstance(node, ast.Constant) and isinstance(node.value, str)))
    }
    names = [destination(call) for call in additions(tree) if not without_effect(call)]
    return [name for name in names if name is not None and name not in read]


@pytest.mark.parametrize("file", FILES)
def test_every_option_is_read(file: str) -> None:
    assert unread((ROOT / file).read_text(encoding="utf-8")) == []


def test_nearly_all_options_are_spelled_out() -> None:
    trees = [ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in FILES]
    names = [destination(call) for tree in trees for call in additions(tree)]
    assert len(names) > 100 and names.count(None) <= 1  # the tolerances of tools/transfer.py, read in a loop


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("p.add_argument('--run_dir')\nprint(args.run_dir)", []),
        ("p.add_argument('--run-dir', '-r')\nprint(args.run)", ["run_dir"]),
        ("p.add_argument('-r', dest='run')\nprint('run_dir')", ["run"]),
        ("p.add_argument('--tp')\ngetattr(args, 'tp')", []),
        ("p.add_argument('folder', help='read')", ["folder"]),
        ("p.add_argument('--local_rank', help=argparse.SUPPRESS)", []),
        ("p.add_argument('--json', help='no effect: it is JSON anyway')", []),
    ],
)
def test_an_option_that_nothing_reads_is_noticed(text: str, names: list[str]) -> None:
    assert unread(text) == names
