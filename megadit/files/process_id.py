"""Which process something belongs to, and whether it still lives.

A process is named by host, kernel start, process-id namespace, process id and the process's start time, so that a
number that the system has given to another process is not taken for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from pathlib import Path
from typing import Literal


@functools.cache
def view_of_processes() -> str:
    """What process ids of the calling process mean: host, kernel start and namespace. Equal: the same processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def start_of(pid: int) -> str | None:
    """A mark of when the process started; None when there is none, or only its exit status waits to be read."""
    if Path("/proc/self/stat").is_file():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def state_of(pid: int, started: str) -> Literal["running", "gone", "unknown"]:
    """Whether the process of this view with that number and start lives; unknown where the system hides it."""
    found = start_of(pid)
    if found is not None:
        return "running" if found == started else "gone"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except (PermissionError, OverflowError):
        return "unknown"  # of another user, where /proc shows only one's own
    return "unknown" if not Path(f"/proc/{pid}").exists() else "gone"  # the latter: it ended, and nobody has asked how
