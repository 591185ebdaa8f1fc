"""Writing files: atomically, as safetensors, where nothing of another kind is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_NAME_BYTES = 255  # of a name in a folder, on every file system in use
_FLOAT_BYTES = 4
_BEGIN_BYTES = 128  # of a file, which show its kind
PNG, ARRAYS = (b"\x89PNG",), (b"PK", b"arr_0.npy")
_PATH_BYTES = 4000  # of a whole path; Linux takes 4095, and files will lie in the folder


@contextlib.contextmanager
def atomic_write(path: Path, *, first: bool = False) -> Iterator[Path]:
    """``with atomic_write(path) as temporary``: write ``temporary``; at the end it takes the name ``path``.

    A reader sees the old file or the whole new one, whoever else writes it, on this host or another. After an error
    the old one stays and nothing else is left. The folder must exist. Not fsynced: for what a crash of the machine
    may lose, not for checkpoints. ``first``: a file that has the name by then stays, and what was written is dropped.
    """
    # Containers may share both their host's name and the numbers of processes.
    suffix = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.stem}.{suffix}{path.suffix}")
    try:
        yield temporary
        if first:
            with contextlib.suppress(FileExistsError):
                _link_or_replace(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # gone to its name, or the folder itself is not there
            temporary.unlink()


def _link_or_replace(temporary: Path, path: Path) -> None:
    """Give the file its name. Raises FileExistsError where that is taken, on file systems that have hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no links here; a lack of rights or of space shows at the next call
        os.replace(temporary, path)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    sync: bool = False,
    first: bool = False,
) -> None:
    """Write safetensors as a whole file that whoever may read other new files in its folder may read too.

    ``safetensors.torch.save_file`` makes its file its owner's alone, so that nobody else could share a cache. The
    tensors must be contiguous and share no memory. ``sync``: fsync it, where a crash of the machine should not
    cost what was long in computing. ``first``: as of ``atomic_write``.
    Raises OSError where the file cannot be written, also for a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path, first=first) as temporary:
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


@contextlib.contextmanager
def refuse_unwritable(key: str, path: Path, remedy: str) -> Iterator[None]:
    """A block that writes below ``path``: an OSError in it becomes a UserError with the option ``key``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}: '{path}' cannot be written ({error.strerror or error}); {remedy}") from error


def user_cache() -> Path:
    """megadit's folder in the user's cache ($XDG_CACHE_HOME, else ~/.cache); it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megadit"


def safetensors_header(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """How a safetensors file of float32 tensors begins, whose values follow one another in the order of ``shapes``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for key, shape in shapes.items():
        end = position + _FLOAT_BYTES * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def is_file_name(name: str) -> bool:
    """Whether a folder could hold a file of that name, so that it leads nowhere else: a name and no path."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= _NAME_BYTES and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def begins_with(path: Path, marks: tuple[bytes, ...]) -> bool:
    """Whether the first line of the file at ``path`` begins with one of ``marks``; not if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.readline().startswith(marks)
    except OSError:
        return False


def check_output(path: Path, key: str, kind: str, marks: tuple[bytes, ...]) -> None:
    """Whether ``path`` may be written: a file that is there must be of this ``kind``, with ``marks`` at its beginning.

    Raises:
        UserError: it is a file of another kind, which would be lost.
    """
    try:
        if not path.is_file():
            return
        with open(path, "rb") as file:
            begin = file.read(_BEGIN_BYTES)
    except OSError:
        return  # reported when it is written
    if begin and not all(mark in begin for mark in marks):
        raise UserError(f"{key}: '{path}' is no {kind} and would be replaced; choose another name")


def check_folder(path: Path, key: str) -> None:
    """Whether ``path`` is a folder or could be made one; only looks. ``key`` is the option that names it.

    Raises:
        UserError: it or a folder above it is a file, a link that leads nowhere or in a circle, may not be entered, or
            has a name that is too long.
    """
    if len(os.fsencode(path.absolute())) > _PATH_BYTES:
        raise UserError(f"{key}: '{str(path)[:40]}…' has more than {_PATH_BYTES} bytes; shorten it")
    for name in path.parts:
        if len(os.fsencode(name)) > _NAME_BYTES:
            raise UserError(f"{key}: '{name[:40]}…' is longer than a name's {_NAME_BYTES} bytes; shorten it")
    for part in (*reversed(path.parents), path):
        try:
            mode = os.stat(part).st_mode
        except OSError as error:
            if error.errno == errno.ENOENT and not part.is_symlink():
                break  # it can be made, with all below it
            problem = _folder_problem(part, error)
        else:
            if stat.S_ISDIR(mode):
                continue
            problem = "is a file, not a folder"
        which = "it" if part == path else f"'{part}'"
        raise UserError(f"{key}: '{path}' cannot be written ({which} {problem}); choose another")


def _folder_problem(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"is a link to '{os.readlink(path)}', which is not there"
    if error.errno == errno.ELOOP:
        return "is a link that leads in a circle"
    return f"cannot be looked at ({error.strerror or error})"
