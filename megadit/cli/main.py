"""``python -m megadit COMMAND``, or ``megadit COMMAND`` where it is installed: the commands by name."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megadit import cli
from megadit.errors import EXIT_BAD_INPUT, EXIT_OK, UserError, did_you_mean, run_command

_COLUMNS = 100  # of the listing at most


def names() -> list[str]:
    """The commands, which are the modules of this package that have a ``main`` of their own."""
    return sorted(module.name for module in pkgutil.iter_modules(cli.__path__) if module.name != "main")


def main() -> None:
    """Run the command that ``sys.argv`` names, or list all of them; does not return."""
    if sys.argv[1:2] and sys.argv[1] in names():
        name = sys.argv[1]
        program = "python -m megadit" if Path(sys.argv[0]).name == "__main__.py" else "megadit"
        sys.argv[:2] = [f"{program} {name}"]  # what usage lines call it
        run(name)
    run_command(_list_commands)


def run(name: str) -> None:
    """Run one command with the arguments of ``sys.argv``; does not return."""
    module = _module(name)
    run_command(module.main, may_be_empty=getattr(module, "MAY_BE_EMPTY", ()))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{cli.__name__}.{name}")


def _list_commands(argv: Sequence[str] | None = None) -> int:
    """Print all commands, a line each. Raises UserError where another one was asked for."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] not in ("-h", "--help"):
        raise UserError(f"{words[0]!r} is not a command; {did_you_mean(words[0], names())} --help lists all")
    width = max(map(len, names()))
    room = min(shutil.get_terminal_size().columns, _COLUMNS) - width - 4
    print("usage: python -m megadit COMMAND [...]\n")
    for name in names():
        what = (_module(name).__doc__ or "").strip().splitlines()[0]
        print(f"  {name:<{width}}  {textwrap.shorten(what, max(room, 20), placeholder=' …')}")
    print("\npython -m megadit COMMAND --help says more of one.")
    return EXIT_OK if words else EXIT_BAD_INPUT
