"""Errors written for people, and the exit codes that scripts rely on.

Every command exits with one of the codes below. ``UserError`` is the only exception that a command
turns into a single sentence and exit code 2: it names the key, the value and the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_VERDICT_NO = 3
EXIT_PREEMPTED = 85


class UserError(Exception):
    """Bad input from a person: one sentence that names the key, the value and the remedy (exit code 2).

    ``everywhere`` says that every rank of the run raises it alike, so that one of them is enough to tell it.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's ``main`` and leave the process with its exit code.

    A ``UserError`` becomes one line on stderr and exit code 2; any other exception keeps its traceback
    (Python's exit code 1), since it is a defect and not the user's input.
    """
    try:
        code = main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    sys.stdout.flush()
    sys.exit(code)
