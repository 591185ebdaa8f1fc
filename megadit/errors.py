"""Errors written for people, and the exit codes that scripts rely on.

Every command exits with one of the codes below. ``UserError`` is the only exception that a command
turns into a single sentence and exit code 2: it names the key, the value and the remedy.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from megadit.streams import lost_output, steady_streams

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_VERDICT_NO = 3
EXIT_PREEMPTED = 85
EXIT_INTERRUPTED = 130  # by Ctrl-C, where a command has nothing to save; as shells say it

_MOST_LETTERS = 4000  # of a message: a screen
_MOST_LINES = 4  # of sentences that say the like


class UserError(Exception):
    """Bad input from a person: one sentence that names the key, the value and the remedy (exit code 2).

    ``everywhere`` says that every rank of the run raises it alike, so that one of them is enough to report it.
    ``code`` is what the command exits with. What a message quotes of a file may be anything, so control characters
    are shown by their escapes, and of a very long message the middle is left out.
    """

    code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(_fit_to_print(message))
        self.everywhere = everywhere


def _fit_to_print(message: str) -> str:
    if not message.isprintable():
        message = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    left_out = len(message) - _MOST_LETTERS
    if left_out <= 0:
        return message
    return f"{message[: _MOST_LETTERS * 3 // 4]} … [{left_out:,} characters] … {message[-_MOST_LETTERS // 4 :]}"


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an exception on one line of at most ``most`` characters; its class where it is empty."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """ "did you mean NEAREST?", of what is ``known``; ``otherwise`` where none is near, None: ask all the same."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6 if otherwise else 0.0)
    return f"did you mean {near[0]}?" if near else otherwise or ""


def few_lines(sentences: Sequence[str]) -> str:
    """The first sentences, one a line, and how many more there are: a wrong file would fill the screen."""
    more = len(sentences) - _MOST_LINES
    shown = [*sentences[:_MOST_LINES], f"and {more} more of the kind"] if more > 1 else sentences
    return "\n".join(shown)


def run_command(
    main: Callable[[Sequence[str] | None], int],
    argv: Sequence[str] | None = None,
    may_be_empty: Sequence[str] = (),
) -> None:
    """Run a command's ``main`` and leave the process with its exit code.

    A ``UserError`` becomes one line on stderr and its exit code, 2 as a rule. Nothing that is printed raises. Where a
    result was printed and did not get there, the exit code is 1 in place of 0: without a word if the reader went away,
    as ``head`` does. Any other exception keeps its traceback (Python's exit code 1), since it is a defect and not the
    user's input. An argument without a letter is refused but for the options ``may_be_empty``.
    """
    steady_streams()
    code = _exit_code(main, argv, may_be_empty)
    lost = lost_output()
    if lost is not None and not code:
        code = EXIT_FAILURE
        if lost.errno != errno.EPIPE:
            print(f"error: stdout: the result cannot be written ({lost.strerror})", file=sys.stderr)
    sys.exit(code)


def _exit_code(
    main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None, may_be_empty: Sequence[str]
) -> Any:
    try:
        _refuse_empty(sys.argv[1:] if argv is None else argv, may_be_empty)
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as end:  # of argparse, after --help or an option that it does not know
        return end.code


def _refuse_empty(words: Sequence[str], may_be_empty: Sequence[str]) -> None:
    """What a shell makes of ``--run_dir "$DIR"`` where DIR is not set would silently mean the default, or this folder.

    Raises:
        UserError: a word is empty, naming the option before it.
    """
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals and not value.strip():
            name = option
        elif not word.strip():
            name = before if before.startswith("--") else f"the argument after {before!r}" if before else "the argument"
        else:
            continue
        if name not in may_be_empty:
            raise UserError(
                f"{name}: is empty (a variable of the shell that is not set?); give a value, or leave it out"
            )


def why_unreadable(error: OSError, remedy: str) -> str:
    """ "(Permission denied); give yourself the right to read it", or another reason and ``remedy``: ends a sentence."""
    if isinstance(error, PermissionError):
        remedy = "give yourself the right to read it"
    return f"({error.strerror or error}); {remedy}"


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print a line for people, by default to stderr, where it may go wrong without consequences.

    For what is reported beside the work of a command: a terminal that is gone, a full disk behind the stream or an
    encoding without the letter must not end a run. What is still written there later goes nowhere.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None:  # the command was started without one
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):
        _mute(stream)


@contextlib.contextmanager
def warn_on_failure(action: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """In the block a failure of ``action`` is a warning: for what follows when the work is done and saved.

    Exceptions of the types ``passing`` are raised.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"warning: {action} failed ({reason}); what was saved before is whole")


def _mute(stream: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
