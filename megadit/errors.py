"""Errors written for people, and the exit codes that scripts rely on.

Every command exits with one of the codes below. ``UserError`` is the only exception that a command
turns into a single sentence and exit code 2: it names the key, the value and the remedy.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any

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

    A ``UserError`` becomes one line on stderr and exit code 2. A reader of the output that goes away, as ``head`` does,
    ends the command with exit code 1 and without a word. Any other exception keeps its traceback (Python's exit code
    1), since it is a defect and not the user's input.
    """
    try:
        code = _exit_code(main, argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        code = EXIT_FAILURE
    sys.exit(code)


def _exit_code(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> Any:
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (
        SystemExit
    ) as end:  # argparse, after --help or an option it does not know: what it printed is not flushed yet
        return end.code


def _nobody_reads() -> bool:
    """Whether the reader of stdout or stderr is gone. What is still written there goes nowhere from now on, since
    Python flushes both once more at its end.
    """
    gone = []
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            gone.append(stream.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in gone:
        os.dup2(nowhere, number)
    os.close(nowhere)
    return bool(gone)
