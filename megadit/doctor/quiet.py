"""Two helpers of the checks: silence around noisy imports, and errors in one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def one_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters; of a failed program, the end of what it said."""
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or str(error)
    lines = text.strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1] if said else lines[0]}"[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what imports and probes print (both descriptors: C++ code writes there too), so that the table stays one."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            for stream, _ in saved:
                os.dup2(nowhere.fileno(), stream)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
