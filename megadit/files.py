"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, sync: bool = False
) -> None:
    """Write safetensors as a whole file that whoever may read other new files in its folder may read too.

    ``safetensors.torch.save_file`` makes its file its owner's alone, so that nobody else could share a cache. The
    tensors must be contiguous and share no memory. ``sync``: fsync it, where a crash of the machine should not
    cost what was long in computing. Raises OSError where the file cannot be written, also for a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        temporary.touch()  # with the rights that the user's umask and the folder give
        rights = temporary.stat().st_mode & 0o777
        try:
            save_file(dict(tensors), str(temporary), None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())) from error
        with open(temporary, "rb") as file:
            os.fchmod(file.fileno(), rights)
            if sync:
                os.fsync(file.fileno())
