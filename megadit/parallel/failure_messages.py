"""What is told of a rank that ends with an error, so that people find the first error and not what followed from it.

When one rank ends, the collectives of all others break one after the other. These say so in one line; their
tracebacks, which look like the error, would only bury it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import traceback
from pathlib import Path

# What gloo and NCCL say of a connection whose other end is gone.
_GONE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Connection was likely closed"
)
_LATE = re.compile(r"(?i)timed out waiting|timeout caused pair closure|ran for \d+ milliseconds before timing out")


def peer_failure(error: BaseException) -> str | None:
    """One line for an error that only says that another rank has ended; None for any other."""
    found = _GONE.search(str(error)) if isinstance(error, RuntimeError | OSError) else None
    return None if found is None else f"another rank has ended ({found.group()}), and so this one does: see its error"


def explain_timeout(error: BaseException, limit_s: float) -> None:
    """Add to an error of a collective that waited too long what that means, once."""
    if isinstance(error, RuntimeError) and _LATE.search(str(error)) and not hasattr(error, "__notes__"):
        error.add_note(
            f"This rank waited in a collective for longer than parallel.timeout_s, {limit_s:g} s: another rank hangs, "
            "is far behind or cannot be reached. Raise the limit if it only needs longer."
        )


def write_torchelastic_error(text: str) -> None:
    """Let torchrun's summary, the last lines of a failed run, say why this rank ended: it reads a file for that."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")


def peer_wrote_torchelastic_error() -> bool:
    """Whether another rank of this host has told torchrun why it ended."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    own = Path(file)  # of attempt/LOCAL_RANK/error.json
    return any(other.parent != own.parent for other in own.parent.parent.glob(f"*/{own.name}"))


def summary(error: BaseException) -> str:
    """The error and where it was raised, in a line or two."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f' (file "{frames[-1].filename}", line {frames[-1].lineno})' if frames else ""
    return "".join(traceback.format_exception_only(error)).strip() + where
