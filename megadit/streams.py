"""stdout and stderr that never raise: whatever their encoding, and whether or not anybody is still there to read.

A print is the least part of a run: a terminal that is closed, a full disk behind ``> log`` or a locale of ASCII must
not end a training, nor make a finished one fail. So what cannot be encoded is escaped, what cannot be written is
dropped, and whether anything of stdout was lost counts at the end, for commands whose result is what they print.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

_STANDARD = (0, 1, 2)


class SteadyRaw(io.RawIOBase):
    """The file descriptor ``number``; writes never raise. ``failure`` is the first error that one met."""

    def __init__(self, number: int, failure: OSError | None = None) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self._number, self._closed = number, failure

    def writable(self) -> bool:
        """True: writes never raise."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal, and one that is still there."""
        try:
            return os.isatty(self._number)
        except OSError:
            return False

    def write(self, data: Any) -> int:
        """Write all of it, or drop it."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                if self._closed is not None:
                    raise self._closed
                done += os.write(self._number, view[done:])
            except BlockingIOError:  # a terminal or pipe that another program made so: it will take more in a while
                select.select([], [self._number], [])
            except OSError as error:
                self.failure = self.failure or error
                break
        return len(view)


class SteadyText(io.TextIOWrapper):
    """A standard stream. ``forgiven``: nothing that matters is lost with what cannot be written."""

    forgiven = False

    def __init__(self, raw: SteadyRaw, encoding: str, *, line_buffering: bool, write_through: bool) -> None:
        buffer = raw if write_through else io.BufferedWriter(raw)
        super().__init__(
            buffer,  # type: ignore[arg-type]  # TextIOWrapper takes a raw file too, as python -u gives it
            encoding=encoding,
            errors="backslashreplace",
            line_buffering=line_buffering,
            write_through=write_through,
        )
        self._raw = raw

    @property
    def failure(self) -> OSError | None:
        """The first error that a write met."""
        return self._raw.failure


def steady_streams() -> None:
    """Put streams that never raise in the place of ``sys.stdout`` and ``sys.stderr``.

    A standard file that was closed (``>&-``) is opened on nothing first: the next file that the process opens would
    get its number, and what libraries print. Streams that somebody else put there, such as a test, stay.
    """
    closed = {number for number in _STANDARD if not _is_open(number)}
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or _is_pythons_own(stream, number):
            setattr(sys, name, _steady(stream, number, closed=number in closed))


def result_is_saved(*, as_json: bool = False) -> None:
    """From here on, what is printed only reports a result that is on disk: if it cannot be written, nothing is lost.

    ``as_json``: it was asked for on stdout, too, and so it matters after all.
    """
    if isinstance(sys.stdout, SteadyText) and not as_json:
        sys.stdout.forgiven = True


def lost_output() -> OSError | None:
    """Why a result that was printed to stdout did not get there; None if it did, or only reported a saved one."""
    stream = sys.stdout
    if not isinstance(stream, SteadyText):
        return None
    stream.flush()
    return None if stream.forgiven else stream.failure


def _steady(stream: TextIO | None, number: int, *, closed: bool) -> SteadyText:
    failure = OSError(errno.EBADF, "it is closed") if closed else None
    raw = SteadyRaw(number, failure)
    if not isinstance(stream, io.TextIOWrapper):
        return SteadyText(raw, "utf-8", line_buffering=True, write_through=False)
    return SteadyText(
        raw, stream.encoding, line_buffering=stream.line_buffering, write_through=bool(stream.write_through)
    )


def _is_pythons_own(stream: TextIO, number: int) -> bool:
    try:
        return type(stream) is io.TextIOWrapper and stream.fileno() == number
    except (OSError, ValueError):  # it writes to no file, or is closed
        return False


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
