"""``owner.json``: who owns a folder, and the operations on it that only one process can do, whoever else tries.

No lock of the kernel (``flock``, as filelock takes) is behind them: they are links and renames, which network file
systems do in one act too, and by which processes of earlier versions are kept out.

A process is named by host, kernel start, process-id namespace, process id and the process's start time, so that a
number that the system has given to another process is not taken for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import secrets
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FILE = "owner.json"
BEAT_S = 5.0  # between two advances of an owner's counter
_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}  # of an owner's facts
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """What ``owner.json`` says beside its counter. ``folder`` is the inode, by which a copied file is known."""

    token: str
    purpose: str
    host: str
    view: str
    pid: int
    process_start: str
    since: str
    folder: int
    command: str = ""
    slurm_cluster: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0
    beat_s: float = BEAT_S

    @classmethod
    def of_this_process(cls, folder: Path, purpose: str, beat_s: float) -> Owner:
        """The calling process as the owner of ``folder``."""
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            token=secrets.token_hex(8),
            purpose=purpose,
            host=socket.gethostname(),
            view=process_namespace(),
            pid=os.getpid(),
            process_start=process_start_time(os.getpid()) or "",
            since=time.strftime("%F %T %z"),
            folder=folder.stat().st_ino,
            command=shlex.join(sys.argv),
            slurm_cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
            beat_s=beat_s,
        )

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner that the file's text names; None for text that this program did not write whole."""
        try:
            values = json.loads(text)
            fields = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(cls) if field.name in values}
            well_typed = all(isinstance(values[name], kind) for name, kind in fields.items())
            return cls(**{name: values[name] for name in fields}) if well_typed else None
        except (ValueError, TypeError, RecursionError):
            return None

    def text(self) -> str:
        """The file's text; the counter is its last value and has a fixed width, so that it is changed in place."""
        body = json.dumps(dataclasses.asdict(self), indent=1)
        return f'{body[:-2]},\n "beat": {0:12d}\n}}\n'

    def describe(self) -> str:
        """Process, host, Slurm job and start, for messages."""
        job = f"Slurm job {self.slurm_job}, " if self.slurm_job else ""
        return f"process {self.pid} on {self.host} ({job}since {self.since})"

    def state(self) -> Literal["running", "gone", "unknown"]:
        """Whether the process lives, as far as the calling one can see it."""
        return state_of(self.pid, self.process_start) if self.view == process_namespace() else "unknown"

    def is_here(self) -> bool:
        """Whether it is the calling process."""
        this_process = (process_namespace(), os.getpid(), process_start_time(os.getpid()) or "")
        return (self.view, self.pid, self.process_start) == this_process

    def was_requeued_as(self, later: Owner) -> bool:
        """Whether ``later`` is a later start of the same Slurm job."""
        mine, other = (self.slurm_cluster, self.slurm_job), (later.slurm_cluster, later.slurm_job)
        return bool(self.slurm_job) and mine == other and self.slurm_restarts < later.slurm_restarts


class OwnerFile:
    """The operations on one lock file; each is done by one process only, whoever else tries it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str | None:
        """The text; None where there is no file. Opening it asks a network file system anew."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, owner: Owner) -> bool:
        """Whether the file was not there and is now the owner's."""
        temporary = self._written(owner)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return self._is_of(owner)  # where the answer to a link that was made got lost
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_exclusively(owner)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def replace(self, owner: Owner) -> None:
        """Put the owner's file in the place of another's, without a moment in which there is none."""
        temporary = self._written(owner)
        try:
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, owner: Owner) -> None:
        """Remove the file if it is the owner's; another's that took its place meanwhile is put back."""
        if not self._is_of(owner):
            return
        aside = self._beside(owner)
        os.rename(self.path, aside)
        owner_there = Owner.parse(aside.read_text(encoding="utf-8", errors="replace"))
        if owner_there is not None and owner_there.token != owner.token:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def advance(self, owner: Owner, beat: int) -> bool:
        """Set the counter, in the owner's own file only; False where the file is another's."""
        text = owner.text()
        with open(self.path, "rb+", buffering=0) as file:
            owner_there = Owner.parse(file.read(4 * len(text.encode())).decode("utf-8", errors="replace"))
            if owner_there is None or owner_there.token != owner.token:
                return False
            file.seek(len(text.encode()) - len(f"{0:12d}\n}}\n"))
            file.write(f"{beat:12d}".encode())
            os.fsync(file.fileno())
        return True

    def _is_of(self, owner: Owner) -> bool:
        owner_there = Owner.parse(self.read() or "")
        return owner_there is not None and owner_there.token == owner.token

    def _beside(self, owner: Owner) -> Path:
        return self.path.with_name(f".{self.path.name}.{owner.token}-{secrets.token_hex(4)}")

    def _written(self, owner: Owner) -> Path:
        temporary = self._beside(owner)
        _write_new(temporary, owner)
        return temporary

    def _create_exclusively(self, owner: Owner) -> bool:
        """As ``create`` where the file system has no hard links: a reader may see the file before its text."""
        try:
            _write_new(self.path, owner)
        except FileExistsError:
            return False
        return True


def _write_new(path: Path, owner: Owner) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(owner.text())
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def process_namespace() -> str:
    """What process ids of the calling process mean: host, kernel start and namespace. Equal: the same processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start_time(pid: int) -> str | None:
    """A mark of when the process started; None when there is none, or only its exit status waits to be read."""
    # Not psutil's seconds where /proc is: owner files of running and of earlier versions hold its clock ticks.
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
    start = process_start_time(pid)
    if start is not None:
        return "running" if start == started else "gone"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except (PermissionError, OverflowError):
        return "unknown"  # of another user, where /proc shows only one's own
    return "unknown" if not Path(f"/proc/{pid}").exists() else "gone"  # the latter: it ended, and nobody has asked how
