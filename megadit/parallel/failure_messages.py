"""Messages of a rank that ends with an error, so that the first error is seen and not its consequences.

When one rank ends, the collectives of all others fail. Those ranks print one line instead of a traceback, which would
look like the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import traceback
from pathlib import Path

# Errors of gloo and NCCL for a connection that the peer closed.
_PEER_GONE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Connection was likely closed"
)
_TIMEOUT = re.compile(r"(?i)timed out waiting|timeout caused pair closure|ran for \d+ milliseconds before timing out")


def peer_failure(error: BaseException) -> str | None:
    """One line for an error which only means that another rank has ended; None for any other."""
    match = _PEER_GONE.search(str(error)) if isinstance(error, RuntimeError | OSError) else None
    return None if match is None else f"another rank has ended ({match.group()}), and so this one does: see its error"


def explain_timeout(error: BaseException, limit_s: float) -> None:
    """Add a note to a collective's time-out error that explains it, once. ``limit_s``: parallel.timeout_s."""
    if isinstance(error, RuntimeError) and _TIMEOUT.search(str(error)) and not hasattr(error, "__notes__"):
        error.add_note(
            f"This rank waited in a collective for longer than parallel.timeout_s, {limit_s:g} s: another rank hangs, "
            "is far behind or cannot be reached. Raise the limit if it only needs longer."
        )


def write_torchelastic_error(text: str) -> None:
    """Write the reason of this rank's end to the file from which torchrun prints its summary of a failed run."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")


def peer_wrote_torchelastic_error() -> bool:
    """Whether another rank of this host has written such a reason."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    path = Path(file)  # attempt/LOCAL_RANK/error.json
    return any(other.parent != path.parent for other in path.parent.parent.glob(f"*/{path.name}"))


def summary(error: BaseException) -> str:
    """The error and where it was raised, in a line or two."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f' (file "{frames[-1].filename}", line {frames[-1].lineno})' if frames else ""
    return "".join(traceback.format_exception_only(error)).strip() + location
