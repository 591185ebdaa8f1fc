"""``python -m megadit COMMAND``: the commands by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from types import ModuleType

from megadit import cli
from megadit.errors import EXIT_BAD_INPUT, EXIT_OK, run_command


def names() -> list[str]:
    """The commands, which are the modules of this package that have a ``main`` of their own."""
    return sorted(module.name for module in pkgutil.iter_modules(cli.__path__) if module.name != "main")


def main() -> None:
    """Run the command that ``sys.argv`` names, or list all of them; does not return."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_listing())
        sys.exit(EXIT_OK if words else EXIT_BAD_INPUT)
    if words[0] not in names():
        near = difflib.get_close_matches(words[0], names(), n=1, cutoff=0.0)
        print(f"error: {words[0]!r} is not a command; did you mean {near[0]}? --help lists all", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.argv[:2] = [f"megadit {words[0]}"]  # what usage lines call it
    run(words[0])


def run(name: str) -> None:
    """Run one command with the arguments of ``sys.argv``; does not return."""
    module = _module(name)
    run_command(module.main, may_be_empty=getattr(module, "MAY_BE_EMPTY", ()))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{cli.__name__}.{name}")


def _listing() -> str:
    width = max(map(len, names()))
    rows = [f"  {name:<{width}}  {(_module(name).__doc__ or '').strip().splitlines()[0]}" for name in names()]
    return "\n".join(
        ["usage: python -m megadit COMMAND [...]", "", *rows, "", "python -m megadit COMMAND --help says more of one."]
    )
