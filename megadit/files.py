"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """``with whole_file(path) as temporary``: write ``temporary``; at the end it takes the name ``path``.

    A reader sees the old file or the whole new one, whoever else writes it, on this host or another. After an error
    the old one stays and nothing else is left. The folder must exist. Not fsynced: for what a crash of the machine
    may lose, not for checkpoints.
    """
    temporary = path.with_name(f".{path.stem}.{socket.gethostname()}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # gone to its name, or the folder itself is not there
            temporary.unlink()
